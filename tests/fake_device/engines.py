"""Point the engines of this process to the fake device, as CUDA would be there."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fake_device.backend import DeviceTensor, OnDevice, register, the_device
from torch import Tensor
from torch.nn import Module, Parameter

from roll_gspo.strategies import device as local

_on_device = False


def _local_device() -> torch.device:
    return the_device() if _on_device else torch.device("cpu")


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Build and run engines on the fake device; outside the block they are on the CPU."""
    global _on_device
    install()
    _on_device = True
    try:
        with OnDevice():
            yield
    finally:
        _on_device = False


def install() -> None:
    """Replace what engines ask for their device; once per process."""
    if local.local_device is _local_device:
        return
    register()
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    importlib.import_module("roll_gspo.strategies.megatron.engine")  # before the loop over its modules
    original, local.local_device = local.local_device, _local_device
    for name, module in list(sys.modules.items()):
        if name.startswith("roll_gspo.strategies.") and vars(module).get("local_device") is original:
            vars(module)["local_device"] = _local_device
    _install_in_megatron()


def _apply(module: Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
    """Convert parameters and buffers; torch's own version unties parameters that it must replace."""
    known: dict[int, Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = known.setdefault(id(parameter), _converted(parameter, convert))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = convert(buffer)
    return module


def _converted(parameter: Parameter, convert: Callable[[Tensor], Tensor]) -> Parameter:
    with torch.no_grad():
        values = convert(parameter)
    if isinstance(values, DeviceTensor) == isinstance(parameter, DeviceTensor):
        parameter.data = values
        return parameter
    made = Parameter(values, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _install_in_megatron() -> None:
    """Make "cuda" the fake device in megatron's stand-in of torch."""
    from roll_gspo.strategies.megatron.engine import compat

    stand_in = vars(compat._Loader.stand_in)
    vars(stand_in["cuda"])["current_device"] = _local_device
    for name in ("tensor", "zeros", "empty", "empty_like", "ones", "arange", "full", "zeros_like"):
        stand_in[name] = _on_current_device(vars(torch)[name])
    torch.Tensor.cuda = lambda self, *_, **__: self.to(_local_device())  # type: ignore[method-assign]


def _on_current_device(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return factory(*args, device=_local_device() if str(device).startswith("cuda") else device, **kwargs)

    return make
