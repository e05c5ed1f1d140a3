"""Bytes that autograd keeps for the backward pass, counted by storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module


def gathered_parameters(module: Module) -> list[Tensor]:
    """Return the buffers that FSDP gathers parameters into; they exist after a first pass."""
    groups = [part._get_fsdp_state()._fsdp_param_group for part in module.modules() if isinstance(part, FSDPModule)]
    return [buffer for group in groups if group for part in group.fsdp_params for buffer in part.all_gather_outputs]


class SavedBytes:
    """Largest sum of the bytes of all storages that were saved at one time; parameters do not count."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.peak = 0
        self._now = 0
        self._owners: dict[int, int] = {}
        self._ignored = {parameter.untyped_storage()._cdata for parameter in parameters}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved in this context."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor):
            yield

    def change(self, storage: torch.UntypedStorage, owners: int) -> None:
        """Add owners of a storage, or remove them."""
        if storage._cdata in self._ignored:
            return
        key = storage.data_ptr()
        before = self._owners.get(key, 0)
        self._owners[key] = before + owners
        self._now += storage.nbytes() * (bool(self._owners[key]) - bool(before))
        self.peak = max(self.peak, self._now)


class _Kept:
    def __init__(self, saved: SavedBytes, tensor: Tensor) -> None:
        self.tensor = tensor
        self._saved = saved
        saved.change(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._saved.change(self.tensor.untyped_storage(), -1)


class _FusedNorm(torch.autograd.Function):
    """An RMS norm that keeps its input and one number per row, as torch's kernel on GPUs does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, d_out = x.float() * scale, gradients[0].float()
        d_normed = d_out * weight.float()
        d_x = scale * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), (d_out * normed).flatten(0, -2).sum(0).to(weight.dtype), None


def fused_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    """Replace `torch.nn.functional.rms_norm`, which is composed of several operations on a CPU."""
    return _FusedNorm.apply(x, weight, eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from roll_gspo.strategies.varlen import packed_attention

    return packed_attention(query, key, value, lengths, None, None)


class _FlashAttention(torch.autograd.Function):
    """Packed attention that keeps queries, keys, values, output and one number per query, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        out = _attend(query, key, value, lengths)
        log_totals = torch.zeros(query.shape[:2])  # as large as the kernel's; the backward pass here does not need it
        ctx.save_for_backward(query, key, value, out, log_totals)
        ctx.lengths = lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors[:3]]
            out = _attend(*inputs, ctx.lengths)
            d_query, d_key, d_value = torch.autograd.grad(out, inputs, gradients[0])
        return d_query, d_key, d_value, None


def flash_attention(dtype: torch.dtype, windowed: bool = False) -> Callable[..., Tensor]:
    """Replace `varlen_kernel`, which has no kernel on a CPU."""
    return lambda query, key, value, spans, scale, window: _FlashAttention.apply(query, key, value, spans.queries)
