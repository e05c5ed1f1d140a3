"""The names of TransformerEngine's modules and parameters without its kernels, for megatron's own specs.

Parameters have the names and shapes of TransformerEngine 2.9: `weight` and `bias`, `layer_norm_weight` of a norm that
is fused into the following projection, and `weight0`, `weight1`, ... of a grouped product.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Module, Parameter

ROOT = "transformer_engine"
_SUBMODULES = ("common.recipe", "pytorch.attention.rope", "pytorch.distributed", "pytorch.fp8", "pytorch.ops")


def _empty(*shape: int) -> Parameter:
    return Parameter(torch.empty(*shape))


class _Linear(Module):
    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, tp_size: int = 1, **_: Any) -> None:
        super().__init__()
        assert tp_size == 1
        self.weight = _empty(out_features, in_features)
        self.bias = _empty(out_features) if bias else None


class _LayerNormLinear(_Linear):
    def __init__(self, in_features: int, out_features: int, *, normalization: str, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"
        self.layer_norm_weight = _empty(in_features)


class _GroupedLinear(Module):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, **_: Any) -> None:
        super().__init__()
        assert not bias
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", _empty(out_features, in_features))


class _RMSNorm(Module):
    def __init__(self, normalized_shape: int = 0, hidden_size: int = 0, **_: Any) -> None:
        super().__init__()
        self.weight = _empty(normalized_shape or hidden_size)  # megatron-core 0.16 and 0.19 name it differently


class _DotProductAttention(Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def _no_offload(*_: Any) -> tuple[None, None]:
    return None, None


_KNOWN = {
    "get_cpu_offload_context": _no_offload,
    "Linear": _Linear,
    "LayerNormLinear": _LayerNormLinear,
    "GroupedLinear": _GroupedLinear,
    "RMSNorm": _RMSNorm,
    "DotProductAttention": _DotProductAttention,
}


class _Stub(types.ModuleType):
    """A module with every public name: the classes above, or an empty class."""

    __version__ = "2.9.0"
    __path__: list[str] = []  # noqa: RUF012 - the attribute of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _KNOWN.get(name) or type(name, (), {"apply": None})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in (ROOT, f"{ROOT}_torch"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Import megatron and its engine again, with TransformerEngine."""
    sys.meta_path.insert(0, _Finder())
    for name in _SUBMODULES:
        importlib.import_module(f"{ROOT}.{name}")
    for name in list(sys.modules):
        if name.partition(".")[0] == "megatron" or name.startswith("roll_gspo.strategies.megatron.engine"):
            del sys.modules[name]
    importlib.import_module("roll_gspo.strategies.megatron.engine")
