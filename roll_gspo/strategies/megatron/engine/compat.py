"""Run megatron-core on a host without CUDA, although it names the device "cuda" unconditionally.

`install()` adds one finder to `sys.meta_path`. In each `megatron.core` module that it loads, the name `torch` refers to
a stand-in whose `cuda` namespace and tensor factories use the host. torch itself is unchanged, except for
`Tensor.cuda()`. Nothing is installed if CUDA is present. Verified with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor


class _Stream:
    """The host as a stream and its events: submitted work is already complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _done(self, *_: Any, **__: Any) -> _Stream:
        return self

    wait_stream = wait = synchronize = record_event = _done


def _on_host(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a tensor factory so that "cuda" means the host. Memory is not pinned, because pinning needs a GPU."""

    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return make


def _stand_in() -> types.ModuleType:
    """Return a module that equals torch except for functions that need a GPU."""
    cuda = types.ModuleType("torch.cuda")
    vars(cuda).update(vars(torch.cuda))
    vars(cuda).update(
        current_device=lambda: torch.device("cpu"),  # device of parameters and buffers
        synchronize=lambda *_, **__: None,  # pipeline point-to-point, checkpoint writing
        Stream=_Stream,  # the all-to-all token dispatcher
        current_stream=_Stream,
        stream=contextlib.nullcontext,
        get_rng_state=torch.get_rng_state,  # the tracker of parallel RNG states
        manual_seed=torch.manual_seed,  # otherwise torch queues the call until a GPU is initialised
    )
    module = types.ModuleType("torch")
    vars(module).update(vars(torch), cuda=cuda)
    # attributes that later imports add to torch are still found
    module.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    # optimizer, gradient clipping and schedules create scratch tensors on "cuda"
    vars(module).update({name: _on_host(vars(torch)[name]) for name in ("tensor", "zeros", "empty", "empty_like")})
    return module


def _as_split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


# module -> names replaced in it after its execution
_REPLACED: dict[str, dict[str, Any]] = {
    # torch.compile of element-wise helpers doubles the import time without a gain on CPUs
    "megatron.core.jit": {"jit_fuser": lambda function: function},
    "megatron.core.tensor_parallel.random": {
        # recomputation saves and restores the generator of the "device"
        "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    },
    "megatron.core.transformer.moe.moe_utils": {
        # bound only if TransformerEngine is installed, but always read
        "te_general_gemm": None,
        # all-to-all needs split sizes as numbers; megatron converts them only if they are on a GPU
        "maybe_move_tensor_to_cpu": _as_split_sizes,
    },
}


class _Loader(importlib.machinery.SourceFileLoader):
    stand_in = _stand_in()

    def get_code(self, fullname: str) -> types.CodeType | None:
        if not fullname.startswith("megatron.core.optimizer."):
            return super().get_code(fullname)
        # the optimizers distinguish parameters by Tensor.type(), with the CUDA names
        source = (self.get_source(fullname) or "").replace("'torch.cuda.", "'torch.")
        return self.source_to_code(source.encode(), self.get_filename(fullname))

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = self.stand_in
        vars(module).update(_REPLACED.get(module.__name__, {}))


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "megatron.core" and not name.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Make megatron-core importable and runnable on this host. Does nothing if CUDA is present or if called again.

    Raises:
        RuntimeError: megatron.core was imported before.
    """
    if torch.cuda.is_available() or _Finder in sys.meta_path:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "roll_gspo.strategies.megatron.engine: megatron.core is already imported; import it after this package"
        )
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    # context parallelism moves rotary slices by Tensor.cuda(), which no stand-in covers
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
