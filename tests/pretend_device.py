"""A device that is not there: CPU tensors that say they are on "cuda:0" and must not meet other CPU tensors.

For machines without a GPU. Inside `pretend_device()` whatever is made for or moved to "cuda" becomes a `PretendTensor`,
which holds a CPU tensor and runs every operation on it. What CUDA refuses is refused with its errors: operations that
mix devices, a CPU generator, `numpy()`. What CUDA does without a word is counted: the host waiting for a number
(``syncs``), tensors sent to the device (``uploads``), work it is given (``launches``: at least one kernel each). Memory
that was not written holds NaN or the smallest integer; random numbers without a generator are others than the CPU's.

How: the wrapper is a tensor of device "meta" to C++, where autograd, views and version counters work as ever; Python
sees "cuda:0". A dispatch mode sees every operation, below autograd; a function mode sees what Python asks for, above.

What it cannot show: CUDA's kernels and their rounding, TF32, autocast on a GPU, streams, memory, speed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
META, CPU = torch.device("meta"), torch.device("cpu")
OTHER_STREAM = 20_260_101  # seed of the device's random numbers, which are not those of the CPU
MEMORY = 8 << 30  # bytes that the device says it has

# Operations with a result whose size, or value, the host needs: it waits for the device.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim"}
WAITING |= {"unique_consecutive", "bincount", "equal", "linalg_cholesky", "histc"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Operations in which CUDA takes a CPU tensor without dimensions as a number.
NUMBERS = {"add", "sub", "rsub", "mul", "div", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum"}
NUMBERS |= {"eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or"}
NUMBERS |= {"logical_xor", "atan2", "hypot", "copysign", "where", "clamp", "clamp_min", "clamp_max", "fill"}
NUMBERS |= {"masked_fill", "xlogy"}
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
SAME_AS = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}


class PretendTensor(Tensor):
    """``inner``: the CPU tensor that holds the numbers."""

    inner: Tensor
    state: State

    @staticmethod
    def __new__(cls, inner: Tensor, state: State) -> PretendTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )
        wrapper.inner, wrapper.state = inner, state
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        state = next(leaf.state for leaf in _leaves(args, kwargs or {}) if isinstance(leaf, PretendTensor))
        return state.run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a checkpoint holds the numbers; what is loaded is on the CPU
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.inner!r}, device='{DEVICE}')"

    __format__ = object.__format__  # type: ignore[assignment]


def is_pretended(device: Any) -> bool:
    """Whether a device argument names the device."""
    if isinstance(device, str):
        device = torch.device(device)
    return isinstance(device, torch.device) and device.type == DEVICE.type


def _map(function: Any, value: Any) -> Any:
    """Tensors within tuples, lists and dicts, replaced; torch's own pytrees are several times slower."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([_map(function, part) for part in value])
    if type(value) is dict:
        return {key: _map(function, part) for key, part in value.items()}
    return value


def _leaves(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, values)
    return found


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


class State:
    """What one pretended device counts: ``syncs``, ``uploads`` and ``launches`` by operation. ``depth``: of the calls
    under way that concern the device, within which C++ code that asks for "meta" means it."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.local = threading.local()
        self.random = torch.Generator().manual_seed(OTHER_STREAM).get_state()

    def __deepcopy__(self, memo: Any) -> State:
        return self

    @contextmanager
    def concerned(self) -> Iterator[None]:
        self.local.depth = getattr(self.local, "depth", 0) + 1
        try:
            yield
        finally:
            self.local.depth -= 1

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """The device's own stream of random numbers instead of the CPU's."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)

    def wrap(self, out: Any) -> Any:
        return _map(lambda x: x if isinstance(x, PretendTensor) else PretendTensor(x, self), out)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, as CUDA would, but on the inner tensors."""
        name, tensors = _name(func), _leaves(args, kwargs)
        pretended = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        device = kwargs.get("device")
        ours = device == META and (pretended or getattr(self.local, "depth", 0) > 0)
        if not pretended and not ours:
            return func(*args, **kwargs)
        to_host = device is not None and not ours
        if name in ("_to_copy", "copy_", "copy"):
            self._count_copy(name, args, to_host)
        elif pretended:
            self._check_devices(func, name, args, kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
        if pretended:
            self._count_syncs(func, name, args)
        if not _view(func) and name not in EMPTY:
            self.launches[name] += 1
        inner_args, inner_kwargs = _map(lambda x: x.inner if isinstance(x, PretendTensor) else x, (args, kwargs))
        if ours:
            inner_kwargs["device"] = CPU
        shapes = [tensor.inner.shape for tensor in tensors if isinstance(tensor, PretendTensor)]
        with ExitStack() as stack:
            if _random(func):
                stack.enter_context(self.own_random())
            out = func(*inner_args, **inner_kwargs)
        assert shapes == [t.inner.shape for t in tensors if isinstance(t, PretendTensor)], f"{func} changed a shape"
        if name in EMPTY:
            _spoil(out)
        return out if to_host else self._results(func, args, kwargs, out)

    def _results(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Arguments that were written to are returned themselves, all else is wrapped."""
        written = _written(func, args, kwargs)
        if not written or out is None:
            return self.wrap(out)
        return tuple(written) if isinstance(out, tuple) else written[0]

    def _count_copy(self, name: str, args: Any, to_host: bool) -> None:
        if name == "_to_copy":
            ours, to_device = isinstance(args[0], PretendTensor), not to_host
        else:
            ours, to_device = isinstance(args[1], PretendTensor), isinstance(args[0], PretendTensor)
        if ours and not to_device:
            self.syncs["to the CPU"] += 1
        elif to_device and not ours and args[0 if name == "_to_copy" else 1].ndim:
            self.uploads[name] += 1

    def _count_syncs(self, func: Any, name: str, args: Any) -> None:
        if name in WAITING or str(func) == "aten.repeat_interleave.Tensor":
            self.syncs[name] += 1
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.syncs["index with a mask"] += 1
            if not all(isinstance(index, PretendTensor) for index in indices):
                self.uploads["index"] += 1

    def _check_devices(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in INDEXING:
            if not isinstance(args[0], PretendTensor):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            strangers = [t for t in _leaves(args[2:], kwargs) if not isinstance(t, PretendTensor) and t.ndim]
        else:
            strangers = [tensor for tensor in _leaves(args, kwargs) if not isinstance(tensor, PretendTensor)]
            if name.removesuffix("_") in NUMBERS:
                written = _written(func, args, kwargs)
                strangers = [t for t in strangers if t.ndim or any(t is other for other in written)]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
                f"{strangers[0].device}! ({func}, shapes {[tuple(t.shape) for t in _leaves(args, kwargs)]})"
            )


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to, in order."""
    return [kwargs[name] if name in kwargs else args[number] for number, name in _places(func)]


@cache
def _places(func: Any) -> list[tuple[int, str]]:
    places = enumerate(func._schema.arguments)
    return [(n, a.name) for n, a in places if a.alias_info is not None and a.alias_info.is_write]


@cache
def _view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way, for which the device does nothing."""
    first = func._schema.returns[0].alias_info if func._schema.returns else None
    return first is not None and not first.is_write


@cache
def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _spoil(out: Tensor) -> None:
    if out.is_floating_point():
        out.fill_(torch.nan)
    elif out.dtype not in (torch.bool, torch.complex64, torch.complex128):
        out.fill_(torch.iinfo(out.dtype).min)


class _Dispatch(TorchDispatchMode):
    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.state.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What Python asks for, where "cuda" has to be translated before C++ sees it."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return self._move(func, name, args, kwargs)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], PretendTensor):
            args = (args[0], self._index(args[1]), *args[2:])
        if is_pretended(kwargs.get("device")) or (name == "new_tensor" and isinstance(args[0], PretendTensor)):
            return self._make(func, name, args, kwargs)
        if any(isinstance(leaf, PretendTensor) for leaf in _leaves(args, kwargs)):
            with self.state.concerned():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _upload(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with self.state.concerned():
            return aten._to_copy.default(tensor, dtype=dtype or tensor.dtype, device=META)

    def _index(self, index: Any) -> Any:
        """Lists and arrays become index tensors on the device, as CUDA makes them."""
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        return self._upload(torch.as_tensor(index)) if isinstance(index, (list, np.ndarray)) else index

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, dtype, copy = args[0], None, kwargs.pop("copy", False)
        if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            device, dtype = args[1].device, args[1].dtype
        elif name == "to":
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        else:
            device = DEVICE if name == "cuda" else CPU
        dtype = dtype or tensor.dtype
        if device is None or device.type == tensor.device.type:
            with self.state.concerned():
                return torch.Tensor.to(tensor, dtype, copy=copy)
        if is_pretended(device):
            return self._upload(tensor, dtype)
        if isinstance(tensor, PretendTensor) and device == CPU:
            return aten._to_copy.default(tensor, dtype=dtype, device=CPU)
        return torch.Tensor.to(tensor, device, dtype, copy=copy)

    def _make(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor on the device, from arguments of any."""
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
        if args and isinstance(args[0], PretendTensor) and name != "new_tensor":
            kwargs.pop("device")
            with self.state.concerned():
                return func(*args, **kwargs)
        if name in ("as_tensor", "asarray", "tensor", "new_tensor"):
            kwargs.pop("device", None)
            if args and isinstance(args[0], PretendTensor):
                return self._upload(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
            wants_grad = kwargs.pop("requires_grad", False)
            made = args[0] if isinstance(args[0], PretendTensor) else self._upload(func(*args, **kwargs))
            return made.requires_grad_() if wants_grad else made
        with self.state.concerned():
            return func(*args, **{**kwargs, "device": META})


@contextmanager
def pretend_device() -> Iterator[State]:
    """Within, "cuda" is this device; what it counts is given. In threads started within, too."""
    state = State()
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with _Dispatch(state), _Functions(state):
            run(thread)

    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:  # a function mode is off within what it handles, such as backward()
        with _Functions(state), state.concerned():
            return engine(*args, **kwargs)

    def current(device: Any = None) -> Tensor:
        return state.random

    def reseed(seed: int) -> None:
        state.random = torch.Generator().manual_seed(seed ^ OTHER_STREAM).get_state()

    def restore(random: Tensor, device: Any = None) -> None:
        state.random = random

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    properties = lambda device=None: SimpleNamespace(name="pretended", total_memory=MEMORY)  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(threading.Thread, "run", within))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", properties))
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state", current))
        stack.enter_context(mock.patch.object(torch.cuda, "set_rng_state", restore))
        stack.enter_context(mock.patch.object(torch.cuda, "manual_seed_all", reseed))
        stack.enter_context(_Dispatch(state))
        stack.enter_context(_Functions(state))
        # A module's parameters stay the same objects when it is moved, as with CUDA: an optimizer may hold them.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield state
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)
