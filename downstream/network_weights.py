"""The weights of a network that a detector has learnt: how they are first drawn, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from downstream.learning import drawing

NETWORK = "network."  # prefix of the names of the weights in the file
Network = TypeVar("Network", bound=nn.Module)
CPU = torch.device("cpu")


def drawn_network(make: Callable[[], Network], seed: int, device: torch.device) -> Network:
    """Make a network with initial weights from the seed, which are the same on every device."""
    with drawing(CPU, seed):
        return make().to(device)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return what to save of a network: every weight and buffer under its name."""
    return {f"{NETWORK}{name}": value for name, value in network.state_dict().items()}


def with_weights(make: Callable[[], Network], tensors: Mapping[str, Tensor]) -> Network:
    """Make a network in evaluation mode with the saved weights among ``tensors``. Raises RuntimeError unless they are
    exactly those of the network, in names and shapes; no memory is allocated for weights that the file lacks."""
    with torch.device("meta"):
        network = make()
    saved = {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)}
    network.load_state_dict(saved, assign=True)
    return network.eval()
