"""A device made of main memory. `register` it only in a process that runs nothing else: it changes torch.

Tensors of the device say that they are on `fake:0` and hold values in main memory. They refuse to mix with CPU tensors
as CUDA tensors do, and they count waits of the host and copies between host and device.

CUDA allows, and so does this device: copies, indices in main memory, and CPU scalars (tensors without dimensions).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"

_aten: Any = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
# the size of the result depends on values, or the result is a number
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}


class MixedDevices(RuntimeError):
    """An operation got tensors of the device and of the CPU."""


@dataclass
class Traffic:
    """Counts of what costs time on a GPU, by the line of the engine that caused it.

    Attributes:
        waits: the host waits for the device, including copies to the host.
        to_device, to_host: copies.
    """

    waits: Counter[str] = field(default_factory=Counter)
    to_device: Counter[str] = field(default_factory=Counter)
    to_host: Counter[str] = field(default_factory=Counter)


traffic = Traffic()


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the traffic of a block."""
    global traffic
    outer, traffic = traffic, Traffic()
    try:
        yield traffic
    finally:
        traffic = outer


def the_device() -> torch.device:
    """Return the only device, which exists after `register`."""
    return torch.device(NAME, 0)


def _line() -> str:
    """Return the innermost line of an engine on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("/roll_gspo/", "/megatron/", "/transformers/"):
            if package in path:
                return f"{path.rpartition(package)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class DeviceTensor(torch.Tensor):
    """A tensor of the device. `inner` holds its values in main memory."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=the_device(),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialise the values as a CPU tensor, which is what a reader that maps files to the CPU gets."""
        return self.inner.detach().__reduce_ex__(protocol)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        """Return the name of a CPU type: megatron's optimizers compare names, and run with those of the CPU here."""
        return self.to(*args, **kwargs) if args or kwargs else self.inner.type()

    def tolist(self) -> Any:
        """Copy values to the host; torch would read memory that this tensor does not have."""
        traffic.waits[_line()] += 1
        return self.inner.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Return values on the device."""
        return _tensor(data, dtype=dtype or self.dtype).to(the_device())

    @property
    def data(self) -> Tensor:
        """Return the values without gradient."""
        return self.detach()

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner


class OnDevice(TorchDispatchMode):
    """Make factories obey `device`; they have no argument that is a tensor of the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type in (NAME, "cuda")


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values in main memory."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    target = kwargs.get("device")
    if function in _COPIES:
        _count_copy(function, own, host, args, target)
    elif own:
        _refuse_mixture(function, own, host, args)
        _count_wait(function, args)
    if target is not None:
        on_device = _is_device(target)
    elif function in _COPIES or function in _INDEXING:
        on_device = isinstance(args[0], DeviceTensor)
    else:
        on_device = bool(own)
    known = {id(tensor.inner): tensor for tensor in own}  # results in place are the arguments

    def wrapped(result: Any) -> Any:
        if not isinstance(result, Tensor) or isinstance(result, DeviceTensor):
            return result
        if id(result) in known:
            return known[id(result)]
        return DeviceTensor(result) if on_device and result.device.type == "cpu" else result

    return pytree.tree_map(wrapped, _on_values(function, args, kwargs))


def _on_values(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    changes = {} if kwargs.get("device") is None or not _is_device(kwargs["device"]) else {"device": "cpu"}
    if kwargs.get("pin_memory"):
        changes["pin_memory"] = False  # only a GPU can pin memory
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs | changes)
    )
    return function(*args, **kwargs)


def _count_copy(function: Any, own: list[DeviceTensor], host: list[Tensor], args: Any, target: Any) -> None:
    if function is _aten.copy_.default:
        to_device, crosses = isinstance(args[0], DeviceTensor), bool(own) and bool(host)
    else:
        to_device = _is_device(target) if target is not None else isinstance(args[0], DeviceTensor)
        crosses = to_device != isinstance(args[0], DeviceTensor)
    if crosses and to_device:
        traffic.to_device[_line()] += 1
    elif crosses:
        traffic.to_host[_line()] += 1
        traffic.waits[_line()] += 1


def _refuse_mixture(function: Any, own: list[DeviceTensor], host: list[Tensor], args: Any) -> None:
    wrong = [tensor for tensor in host if tensor.dim() and tensor.device.type == "cpu"]
    if function in _INDEXING and isinstance(args[0], DeviceTensor):
        indices = [id(leaf) for leaf in pytree.tree_leaves(args[1])]
        sent = [tensor for tensor in wrong if id(tensor) in indices]
        wrong = [tensor for tensor in wrong if id(tensor) not in indices]
        if sent:
            traffic.to_device[_line()] += len(sent)
    if wrong:
        raise MixedDevices(
            f"{_line()}: {function} got tensors of the CPU {[tuple(tensor.shape) for tensor in wrong]} and of the "
            f"device {[tuple(tensor.shape) for tensor in own]}"
        )


def _count_wait(function: Any, args: Any) -> None:
    waits = function in _WAITS
    if function in _INDEXING:
        masks = [leaf for leaf in pytree.tree_leaves(args[1]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        # torch fills under one mask with one number without looking for the positions
        fills = len(args) > 2 and len(args[1]) == 1 and args[2].numel() == 1
        waits = bool(masks) and not fills
    if waits:
        traffic.waits[_line()] += 1


_tensor = torch.tensor


def _tensor_anywhere(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which would allocate memory of the device itself."""
    made = _tensor(pytree.tree_map(_number, data), device="cpu" if _is_device(device) else device, **kwargs)
    return made.to(the_device()) if _is_device(device) else made


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, DeviceTensor) else value


class _Stream:
    """The host as a stream: submitted work is complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *_, **__: self


class _Backend(_DummyBackendModule):
    Stream = Event = _Stream

    def current_stream(self, *_: Any) -> _Stream:
        return _Stream()

    def stream(self, *_: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, *_: Any) -> None:
        traffic.waits[_line()] += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


def register() -> None:
    """Make the device known to torch, for the rest of this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _device_constructors()  # `with torch.device(...)` recognises the factories of its first use, so not the next one
    torch.tensor = _tensor_anywhere
