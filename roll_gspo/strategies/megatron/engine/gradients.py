"""Norm and clipping of the gradients that megatron's optimizers are about to use."""

from __future__ import annotations

import math
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch.nn.utils import get_total_norm

# megatron-core 0.19 renamed the method.
_NAMES = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")
_gradients_of = methodcaller(next(name for name in _NAMES if name in vars(MegatronOptimizer)))


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the norm over all ranks, with one wait for the device; the gradients are prepared.

    It is the value of `MegatronOptimizer.get_grad_norm`, which without TransformerEngine or apex waits for every
    parameter.
    """
    chained: Any = optimizer
    parts = chained.chained_optimizers
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    gradients = [_gradients_of(part) for part in parts]
    if all(group == groups[0] for group in groups):
        groups, gradients = groups[:1], [[gradient for of_part in gradients for gradient in of_part]]
    device = next((gradient.device for of_group in gradients for gradient in of_group), None)
    squares = []
    for group, of_group in zip(groups, gradients, strict=True):
        square = get_total_norm(of_group) ** 2 if of_group else torch.zeros((), device=device)
        dist.all_reduce(square, group=group)
        squares.append(square)
    norms = [square**0.5 for square in torch.stack(squares).tolist()]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def clip_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale the gradients to `clip_grad` of the optimizer's configuration if their norm is larger."""
    chained: Any = optimizer
    for part in chained.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
