"""Search for the nearest settings whose estimated memory fits the devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from roll_gspo.config.base import Schema
from roll_gspo.config.memory import Alternative
from roll_gspo.config.ranks import num_ranks
from roll_gspo.config.roles import ActorInferConfig, ReferenceConfig, Role, TrainedRoleConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.pipelines.devices import devices_of, model_of
from roll_gspo.pipelines.memory import Memory, estimate_memory, longest_sequence
from roll_gspo.strategies.residency import Phase

_ROUNDS = 2  # changes of one role make room for another


@dataclass(frozen=True)
class Fit:
    """Settings that fit, or that come nearest.

    Attributes:
        changes: keys and their values.
        config: the configuration with them.
        memory: its estimate.
        fits: whether it fits.
    """

    changes: Mapping[str, Any]
    config: AnyConfig
    memory: Memory
    fits: bool


def excess_bytes(config: AnyConfig, memory: Memory, device_bytes: float) -> float:
    """Return what the fullest device lacks, summed over phases, plus missing KV cache; 0 if everything fits.

    The sum shows an improvement of one phase although another one lacks more.
    """
    fullest = (max(memory.total(phase, device) for device in memory.phases[phase]) for phase in memory.phases)
    excess = sum(max(amount - device_bytes, 0.0) for amount in fullest)
    for role in memory.roles.values():
        for of in role.generation or ():
            if not isinstance(config, SftConfig) and of.num_tokens < config.engine_sequence_length:
                # An empty cache does not show its size per token, so this is a share of the device.
                excess += (1 - of.num_tokens / config.engine_sequence_length) * device_bytes
    return excess


def nearest_fit(config: AnyConfig, device_bytes: float) -> Fit | None:
    """Return the settings with the fewest changes that fit, or that come nearest; None if sizes are not known.

    Each role in turn gets the cheapest change with which everything fits, given the others.
    """
    memory = estimate_memory(config, device_bytes)
    if memory is None:
        return None
    best = Fit({}, config, memory, excess_bytes(config, memory, device_bytes) <= 0)
    for _ in range(_ROUNDS):
        for name in config.roles():
            if not best.fits:
                best = _improve(best, name, device_bytes)
    return best


def _improve(start: Fit, name: str, device_bytes: float) -> Fit:
    """Return the cheapest change of a role that fits, or the one with the least excess."""
    best, least = start, excess_bytes(start.config, start.memory, device_bytes)
    failing = {
        phase
        for phase, of_devices in start.memory.phases.items()
        if any(start.memory.total(phase, device) > device_bytes for device in of_devices)
    }
    for option in sorted(_options(start.config, name, failing), key=lambda option: option.cost):
        config = changed(start.config, option.changes)
        memory = None if config is None else estimate_memory(config, device_bytes)
        if config is None or memory is None:
            continue
        excess = excess_bytes(config, memory, device_bytes)
        if excess < least:
            best, least = Fit({**start.changes, **option.changes}, config, memory, excess <= 0), excess
        if best.fits:
            break
    return best


def changed(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig | None:
    """Return the configuration with other values of dotted keys, or None if it breaks a rule."""
    of_blocks: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, value in changes.items():
        *path, last = key.split(".")
        of_blocks.setdefault(tuple(path), {})[last] = value
    # All keys of a block change together, from the innermost block on: rules relate them.
    try:
        return _replace(config, (), of_blocks)
    except ValidationError:
        return None


def _replace(block: Any, path: tuple[str, ...], of_blocks: Mapping[tuple[str, ...], Mapping[str, Any]]) -> Any:
    assert isinstance(block, Schema)
    values = {name: block.__dict__[name] for name in block.model_fields_set}
    values |= of_blocks.get(path, {})
    depth = len(path)
    inside = {other[depth] for other in of_blocks if len(other) > depth and other[:depth] == path}
    for name in inside:
        values[name] = _replace(block.__dict__[name], (*path, name), of_blocks)
    return type(block).model_validate(values)


def _options(config: AnyConfig, name: str, failing: Set[Phase]) -> Iterator[Alternative]:
    """Yield combinations of another layout and smaller micro-batches of a role in phases that do not fit."""
    role = config.roles()[name]
    model, num_devices = model_of(config, role), len(devices_of(role))
    layouts = [Alternative(0, {}), *role.strategy_args.alternatives(model, num_devices)]
    batches = [Alternative(0, {}), *_smaller_batches(config, name, role, failing)]
    for layout in layouts:
        of_layout = {f"{name}.strategy_args.{key}": value for key, value in layout.changes.items()}
        for batch in batches:
            changes = {**of_layout, **batch.changes}
            if isinstance(role, TrainedRoleConfig):
                changes = _with_same_mini_batch(config, name, role, changes)
            if changes is not None and (layout.cost or batch.cost):
                yield Alternative(layout.cost + batch.cost, changes)


def _smaller_batches(config: AnyConfig, name: str, role: Role, failing: Set[Phase]) -> Iterator[Alternative]:
    """Yield halves, quarters, ... of the micro-batches of a role, down to one sample."""
    if isinstance(role, ActorInferConfig):
        return
    longest = longest_sequence(config)
    for step in range(1, 8):
        sizes = _batch_keys(name, role.on_device(True, model_of(config, role)), failing)
        smaller = {key: max(value >> step, least or longest) for key, (value, least) in sizes.items()}
        changes = {key: value for key, value in smaller.items() if value < sizes[key][0]}
        if changes:
            yield Alternative(step, changes)


def _batch_keys(
    name: str, role: TrainedRoleConfig | ReferenceConfig, failing: Set[Phase]
) -> dict[str, tuple[int, int | None]]:
    """Return the keys that limit a pass on GPUs, with (value, least value); None is the longest sequence."""
    keys: dict[str, tuple[int, int | None]] = {}
    if Phase.TRAINING in failing and isinstance(role, TrainedRoleConfig):
        if (budget := role.max_tokens_per_microbatch_in_train) is not None:
            keys[f"{name}.max_tokens_per_microbatch_in_train"] = (budget, None)
        else:
            size = role.training_args.per_device_train_batch_size
            keys[f"{name}.training_args.per_device_train_batch_size"] = (size, 1)
    if Phase.SCORING in failing:
        if (budget := role.max_tokens_per_microbatch_in_infer) is not None:
            keys[f"{name}.max_tokens_per_microbatch_in_infer"] = (budget, None)
        else:
            keys[f"{name}.infer_batch_size"] = (role.infer_batch_size, 1)
    return keys


def _with_same_mini_batch(
    config: AnyConfig, name: str, role: TrainedRoleConfig, changes: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the changes with as many accumulated micro-batches that the samples per optimizer step stay the same."""
    args, sizes = role.training_args, role.strategy_args.model_parallel_sizes
    size = changes.get(f"{name}.training_args.per_device_train_batch_size", args.per_device_train_batch_size)
    copy = math.prod(changes.get(f"{name}.strategy_args.{key}", value) for key, value in sizes.items())
    num_devices = num_ranks(role)
    ranks = num_devices // role.strategy_args.model_parallel_size
    total, per_pass = args.mini_batch_size_per_rank * ranks, size * (num_devices // copy)
    if total % per_pass:
        return None
    if total // per_pass == args.gradient_accumulation_steps:
        return dict(changes)
    return {**changes, f"{name}.training_args.gradient_accumulation_steps": total // per_pass}
