"""Sizes of forward passes, and the bytes on one device that engines estimate for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class PassSize(NamedTuple):
    """The largest micro-batch of a role.

    Attributes:
        positions: positions of all samples, padding included.
        predicted: response tokens, whose logits are computed.
        micro_batches: micro-batches of one optimizer step; a pipeline works on several of them at once.
    """

    positions: int
    predicted: int
    micro_batches: int = 1


class PassBytes(NamedTuple):
    """Memory of a pass on one device.

    Attributes:
        activations: kept for the backward pass, and what one layer computes with.
        logits: of the output head: a block of logits, and gradients of the head and of its input.
    """

    activations: float
    logits: float


class GenerationBytes(NamedTuple):
    """Memory of a generation engine on one device besides its weights.

    Attributes:
        kv_cache: keys and values.
        working: activations of one engine step, logits of its samples, CUDA graphs.
        asleep: part of `working` that stays while the engine is offloaded, e.g. CUDA graphs.
        num_tokens: tokens whose keys and values fit into `kv_cache` of one copy of the model.
    """

    kv_cache: float
    working: float
    asleep: float
    num_tokens: int


class Alternative(NamedTuple):
    """Another layout of an engine.

    Attributes:
        cost: number of changes, weighted by what they cost in speed; smaller ones are tried first.
        changes: keys and their values.
    """

    cost: float
    changes: Mapping[str, Any]
