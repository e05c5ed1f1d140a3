"""Layouts of a megatron-core role that need less memory per device (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from pydantic import ValidationError

from roll_gspo.config.memory import Alternative
from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.layout import layout_problems

_MAX_TENSOR = 8  # tensor-parallel ranks share a machine
_MAX_DOUBLINGS = 5
# Cost of doubling a size; of one more sequence of layers that is computed twice, and of a sharded optimizer
_TENSOR, _EXPERT, _PIPELINE, _RECOMPUTE, _SHARDED = 3, 2, 6, 2, 1


def alternatives(
    model: Architecture | None, config: MegatronConfig, world_size: int, *, train: bool = False
) -> Iterator[Alternative]:
    """Yield valid layouts with larger parallel sizes, a sharded optimizer or recomputed layers.

    Args:
        model: the model; None if it is not known.
        config: the present layout.
        world_size: ranks of the role.
        train: whether the role is trained.
    """
    grows = (0, *range(1, _MAX_DOUBLINGS + 1))
    experts = grows if model is not None and model.experts is not None else (0,)
    recomputes = (False, True) if train and config.recompute_granularity != "full" else (False,)
    shards = (False, True) if train and not config.use_distributed_optimizer else (False,)
    for tensor, pipeline, expert, recompute, sharded in product(grows, grows, experts, recomputes, shards):
        changes = _changes(config, tensor, pipeline, expert)
        if recompute:
            changes["recompute_granularity"] = "full"
        if sharded:
            changes["use_distributed_optimizer"] = True
        cost = _TENSOR * tensor + _PIPELINE * pipeline + _EXPERT * expert + _RECOMPUTE * recompute + _SHARDED * sharded
        if changes and _is_valid(model, config, changes, world_size):
            yield Alternative(cost, changes)


def _changes(config: MegatronConfig, tensor: int, pipeline: int, expert: int) -> dict[str, Any]:
    """Return the changed keys after so many doublings of each size."""
    changes: dict[str, Any] = {}
    if tensor:
        changes["tensor_model_parallel_size"] = config.tensor_model_parallel_size << tensor
        if not config.sequence_parallel:
            changes["sequence_parallel"] = True
    if pipeline:
        changes["pipeline_model_parallel_size"] = config.pipeline_model_parallel_size << pipeline
    if expert:
        changes["expert_model_parallel_size"] = config.expert_model_parallel_size << expert
        if config.expert_tensor_size > 1 and config.expert_tensor_parallel_size is None:
            changes["expert_tensor_parallel_size"] = 1
    return changes


def _is_valid(model: Architecture | None, config: MegatronConfig, changes: dict[str, Any], world_size: int) -> bool:
    sizes = (changes.get(key, 1) for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"))
    if changes.get("tensor_model_parallel_size", 1) > _MAX_TENSOR or math.prod(sizes) > world_size:
        return False
    try:
        other = MegatronConfig.model_validate(config.model_dump(exclude_unset=True) | changes)
    except ValidationError:
        return False
    return next(layout_problems(model, other, world_size, None), None) is None
