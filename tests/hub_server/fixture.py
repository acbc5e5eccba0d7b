"""The fixture `hub`: a running Hub that the client in this process talks to, with an empty cache. Nobody waits:
how long ours or the client would have slept is in `Hub.sleeps`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, utils

from hub_server.server import Hub

TOKEN = "token-of-ada"


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What a process of its own needs to talk to ``hub``, with its cache in ``home``."""
    given = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **({"HF_TOKEN": token} if token else {}),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**inherited, **given}


def settings(hub: Hub, home: Path) -> dict[str, object]:
    """The same for a process that has imported the client already: its constants."""
    return {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Ada, of the organisation "factory", is logged in. The client read its settings when it was imported."""
    server = Hub()
    server.start()
    home = tmp_path / "hf"
    for name, value in settings(server, home).items():
        monkeypatch.setattr(constants, name, value)
    for name, value in environment(server, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", server.sleeps.append)
    utils.disable_progress_bars()
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.stop()
