"""Where the tests of devices run: on the pretended one, and on a GPU if there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import Device
from hub_server.fixture import hub as hub
from pretend_device import pretend_device

# pytest puts this folder on the path, where `downstream` is a folder of tests; a package of that name goes before it.
sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(params=["pretend", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The pretended device where there is no GPU, the GPU where there is one."""
    there = torch.cuda.is_available()
    if request.param == "cuda":
        if not there:
            pytest.skip("no CUDA device on this machine")
        yield Device(torch.device("cuda"))
        return
    if there:
        pytest.skip("a real CUDA device is here: nothing to pretend")
    with pretend_device() as state:
        yield Device(torch.device("cuda"), state.syncs, state.uploads, state.launches)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a process that is left with one at the end would keep the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
