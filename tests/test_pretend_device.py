"""The pretended device itself: it refuses what CUDA refuses, computes what the CPU computes, and catches wrong code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_device import PretendTensor, State, pretend_device
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real CUDA device is here: nothing to pretend")
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


@pytest.fixture
def room() -> Iterator[State]:
    with pretend_device() as state:
        yield state


def rows(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4)), generator=torch.Generator().manual_seed(seed))


def test_tensors_say_where_they_are(room: State) -> None:
    here = rows().to("cuda")
    made = [here, here + 1, here.new_zeros(2), torch.zeros_like(here), torch.arange(3, device=here.device), here[1:, 2]]
    made += [torch.tensor([1, 2], device="cuda"), rows().cuda(), torch.as_tensor([1.0], device="cuda:0"), here.double()]
    made += [torch.empty(2, 3, device="cuda"), here.new_tensor([1, 2]), torch.full((2,), 3, device="cuda"), here.T]
    for tensor in made:
        assert isinstance(tensor, PretendTensor)
        assert (tensor.device, tensor.is_cuda) == (torch.device("cuda:0"), True)
    assert type(here.cpu()) is Tensor
    assert type(here.to("cpu", torch.float64)) is Tensor
    assert here.to("cuda") is here
    assert rows().to(here).device == here.device
    assert here.to(rows()).device.type == "cpu"
    assert torch.empty(3, device="meta").device.type == "meta"  # not everything is ours


WRONG: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda here, there: here + there,
    "product": lambda here, there: there.T @ here,
    "linear": lambda here, there: F.linear(here, there),
    "convolution": lambda here, there: F.conv1d(here[None], there.T[..., None]),
    "cat": lambda here, there: torch.cat([here, there]),
    "stack": lambda here, there: torch.stack([there, here]),
    "where": lambda here, there: torch.where(here > 0, here, there),
    "comparison": lambda here, there: here < there,
    "in place": lambda here, there: here.mul_(there),
    "in place, a number on the CPU": lambda here, there: there.sum().add_(here.sum()),
    "out": lambda here, there: torch.mm(here, here.T, out=torch.empty(6, 6)),
    "index_select": lambda here, there: here.index_select(0, torch.arange(2)),
    "gather": lambda here, there: here.gather(1, torch.zeros(6, 1, dtype=torch.int64)),
    "scatter": lambda here, there: here.scatter(1, torch.zeros(6, 1, dtype=torch.int64), 1.0),
    "written by index": lambda here, there: here.index_put_((torch.arange(6),), there),
    "masked": lambda here, there: here.masked_fill(there > 0, 0.0),
    "a number for cat": lambda here, there: torch.cat([here[0], there.sum()[None]]),
    "norm": lambda here, there: F.layer_norm(here, [4], there[0]),
    "searchsorted": lambda here, there: torch.searchsorted(here[0].sort().values, there[0]),
}


@pytest.mark.parametrize("name", WRONG)
def test_mixing_devices_raises(room: State, name: str) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        WRONG[name](rows().to("cuda"), rows(1))
    WRONG[name](rows(), rows(1))  # nothing else is wrong with it


def test_an_index_on_the_device_does_not_fit_a_cpu_tensor(room: State) -> None:
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        rows()[torch.arange(2, device="cuda")]


ALLOWED: dict[str, Callable[[Tensor, torch.device], Tensor]] = {
    "a number": lambda x, place: x * torch.tensor(2.0) + torch.tensor(1),
    "a number in where": lambda x, place: torch.where(x > 0, 1, x),
    "a number to fill": lambda x, place: x.masked_fill(x > 0, torch.tensor(3.0)),
    "an index on the CPU": lambda x, place: x[torch.tensor([2, 0])],
    "a list": lambda x, place: x[[2, 0]],
    "an array": lambda x, place: x[:, np.array([2, 0])],
    "a mask": lambda x, place: x[x > 0],
    "written by a CPU index": lambda x, place: x.clone().index_fill_(0, torch.tensor([1], device=place), 2.0),
    "assigned": lambda x, place: _assigned(x),
}


def _assigned(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = -torch.inf
    x[torch.tensor([1, 3]), 2] = 5.0
    x[4] = torch.arange(4.0)  # a copy crosses over
    x[x > 1] = torch.tensor(9.0)
    return x


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_is_allowed(room: State, name: str) -> None:
    found = ALLOWED[name](rows().to("cuda"), torch.device("cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), ALLOWED[name](rows(), torch.device("cpu")), rtol=0, atol=0)


def test_generators_numpy_and_memory(room: State) -> None:
    here = rows().to("cuda")
    for draw in (
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.randperm(3, device="cuda", generator=torch.Generator()),
        lambda: here.uniform_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            draw()
    for convert in (here.numpy, lambda: np.asarray(here), lambda: np.concatenate([here])):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
            convert()
    assert torch.empty(5, device="cuda").isnan().all()
    assert (here.new_empty(5, dtype=torch.int64) < -(1 << 60)).all()
    torch.manual_seed(0)
    ours = torch.randn(5, device="cuda").cpu()
    assert torch.equal(torch.randn(5), torch.randn(5, generator=torch.Generator().manual_seed(0)))  # nothing was drawn
    assert not torch.equal(ours, torch.randn(5, generator=torch.Generator().manual_seed(0)))


SAME: dict[str, Callable[[Tensor], object]] = {
    "pointwise": lambda x: (x.exp().log1p() / 3 - x).clamp_min(0),
    "product": lambda x: torch.addmm(x[0], x, x.T @ x, alpha=-2),
    "order": lambda x: [*x.sort(1), *x.topk(2), x.argmax(1)],
    "views": lambda x: x.view(2, 3, 4).transpose(1, 2).unflatten(1, (2, 2)).flatten(0, 1).contiguous(),
    "written through a view": lambda x: _through_a_view(x),
    "out": lambda x: torch.mm(x, x.T, out=x.new_empty(36).view(6, 6)),
    "sparse choice": lambda x: [x.nonzero(), x.unique(return_inverse=True)[1], (x > 0).nonzero(as_tuple=True)[0]],
    "scatter": lambda x: x.scatter_reduce(0, x.argsort(0), x, "amin"),
    "linear algebra": lambda x: torch.linalg.cholesky_ex(x.T @ x + torch.eye(4, device=x.device))[0],
    "convolution": lambda x: F.conv2d(F.pad(x[None, None], (1, 1, 1, 1)), x[None, None, :3, :3]),
    "resampling": lambda x: F.interpolate(x[None, None], (9, 9), mode="bilinear", align_corners=False),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "repeat": lambda x: torch.arange(6, device=x.device).repeat_interleave(2),
    "numbers": lambda x: torch.tensor([float(x.sum()), x.max().item(), bool((x > 0).any()), *x[0].tolist()]),
}


def _through_a_view(x: Tensor) -> Tensor:
    x = x.clone()
    x[1:3].mul_(2)
    x.T[0] += 1
    x.view(-1)[::2].zero_()
    return x


@pytest.mark.parametrize("name", SAME)
def test_results_are_the_cpu_s(room: State, name: str) -> None:
    found, expected = SAME[name](rows().to("cuda")), SAME[name](rows())
    pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
    tolerance = 1e-6 if name == "attention" else 0  # the CPU has a fused kernel
    for ours, theirs in pairs:
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


class Doubled(torch.autograd.Function):
    """A backward pass of one's own, which makes a tensor."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.full((1,), 2.0, device=grad.device)


def train(place: str, steps: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    adam = torch.optim.Adam(model.parameters(), 0.1)  # made before the move: it must hold the moved weights
    model.to(place)
    for step in range(steps):
        loss = Doubled.apply(model(rows(step).to(place))).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return model, model.to("cpu")


def test_training_gives_the_cpu_s_weights(room: State) -> None:
    found, expected = train("cuda")[1].state_dict(), train("cpu")[1].state_dict()
    untrained = train("cpu", steps=0)[1].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        assert not torch.equal(value, untrained[name])


def test_waiting_and_sending_are_counted(room: State) -> None:
    here = rows().to("cuda")
    assert (dict(room.syncs), dict(room.uploads)) == ({}, {"_to_copy": 1})
    assert torch.mm(here, here.T).relu().sum(1).topk(2).values.is_cuda
    assert not room.syncs
    counted: list[tuple[Callable[[], object], int]] = [
        (lambda: here.sum().item(), 1),
        (lambda: float(here.amax()), 1),
        (lambda: bool((here > 0).any()), 1),
        (lambda: here.nonzero(), 1),
        (lambda: here[here > 0], 1),
        (lambda: here.unique(), 1),
        (lambda: here.cpu(), 1),
        (lambda: here.tolist(), 1),
        (lambda: [float(value) for value in here[0]], 4),
        (lambda: here[torch.zeros(2, dtype=torch.int64, device="cuda")], 0),
    ]
    for call, number in counted:
        before = room.syncs.total()
        call()
        assert room.syncs.total() - before == number
    before = room.uploads.total()
    here[torch.tensor([1])], here[[1, 2]], torch.tensor([1.0], device="cuda")
    assert room.uploads.total() - before == 3


def positions(maps_BHW: Tensor) -> Tensor:
    """Wrong: `arange` forgets the device."""
    return maps_BHW.flatten(1) * torch.arange(maps_BHW[0].numel())


def sampled(rows_ND: Tensor) -> Tensor:
    """Wrong: the choice depends on the device's own random numbers."""
    return rows_ND[torch.rand(len(rows_ND), device=rows_ND.device).argsort()[:3]]


def accumulated(rows_ND: Tensor) -> Tensor:
    """Wrong: it adds to memory that was never written. On a CPU, fresh pages are often zero."""
    return torch.empty_like(rows_ND).add_(rows_ND)


def test_deliberately_wrong_functions_are_caught(room: State) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        positions(rows(0, 2, 3, 3).to("cuda"))
    torch.manual_seed(0)
    expected = sampled(rows())
    torch.manual_seed(0)
    assert not torch.equal(sampled(rows().to("cuda")).cpu(), expected)
    assert accumulated(rows().to("cuda")).isnan().all()


def test_outside_nothing_is_left(room: State) -> None:
    """The room is left and entered again within its own fixture."""
    kept = rows().to("cuda")
    room_of_its_own = pretend_device()
    with room_of_its_own as inner:
        assert inner is not room
    assert torch.equal((kept * 2).cpu(), rows() * 2)


def test_the_world_is_as_before() -> None:
    with pretend_device():
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
    assert not torch.__future__.get_swap_module_params_on_conversion()
