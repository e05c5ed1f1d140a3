"""Both engines on a device that refuses CPU tensors: the results of the CPU, within a budget of waits and copies.

A budget is the count of the code that it was written with. A test fails if a change adds a wait; lower the budget if a
change removes one. The batches have six samples, and scoring takes two passes. Two waits per micro-batch are those of
the lag buckets, which only batches of asynchronous runs have.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_device import cases
from ranks import Ranks
from tiny_models import write_model

pytestmark = pytest.mark.megatron

FULL_RECOMPUTE = {"recompute_granularity": "full"}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective"}
PACKED = {"use_sequence_packing": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
REPLAY = {"replay_routing": True, "record_routing": True}


class Cost(NamedTuple):
    """Waits of the host for the device (copies to the host included), and copies to the device."""

    waits: int
    to_device: int

    def fits(self, budget: Cost) -> bool:
        return self.waits <= budget.waits and self.to_device <= budget.to_device


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("qwen3_tied", "qwen3_untied", "qwen3_moe")
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture(scope="module")
def process() -> Iterator[Ranks]:
    """A process whose PrivateUse1 backend is the fake device."""
    pool = Ranks()
    yield pool
    pool.close()


def costs(stages: dict[str, Any]) -> dict[str, Cost]:
    """Return the cost of each stage; for updates, that of one micro-batch and that of the rest of the step."""
    found = {
        name: Cost(sum(traffic.waits.values()), sum(traffic.to_device.values())) for name, traffic in stages.items()
    }
    if "update 2" in found:
        two, three = found.pop("update 2"), found.pop("update 3")
        per_micro_batch = Cost(three.waits - two.waits, three.to_device - two.to_device)
        found["micro-batch"] = per_micro_batch
        found["step"] = Cost(two.waits - 2 * per_micro_batch.waits, two.to_device - 2 * per_micro_batch.to_device)
    return found


def check(stages: dict[str, Any], budgets: dict[str, Cost]) -> None:
    """Compare with budgets; an error lists the lines that wait."""
    found = costs(stages)
    over = {name: (found[name], budget) for name, budget in budgets.items() if not found[name].fits(budget)}
    lines = {name: (traffic.waits.most_common(), traffic.to_device.most_common()) for name, traffic in stages.items()}
    assert not over, f"(cost, budget) {over}; by line: {lines}"


@pytest.mark.parametrize(
    ("family", "config", "bf16", "routing", "budgets"),
    [
        ("qwen3_tied", {}, False, {}, {"score": Cost(2, 10), "micro-batch": Cost(2, 5), "step": Cost(4, 0)}),
        ("qwen3_tied", SELECTIVE_RECOMPUTE, True, {}, {"micro-batch": Cost(2, 5), "step": Cost(4, 0)}),
        ("qwen3_untied", PACKED | SHARDED | FULL_RECOMPUTE, False, {}, {"micro-batch": Cost(2, 8), "step": Cost(4, 1)}),
        # megatron's dispatch of tokens waits five times per layer
        ("qwen3_moe", {}, False, {}, {"micro-batch": Cost(15, 5), "step": Cost(4, 0)}),
        ("qwen3_moe", FULL_RECOMPUTE, False, REPLAY, {"micro-batch": Cost(29, 6), "step": Cost(4, 0)}),
    ],
    ids=["dense", "bf16", "packed_sharded", "moe", "replay"],
)
def test_megatron_trains_as_on_the_cpu(
    process: Ranks,
    folders: dict[str, Path],
    family: str,
    config: dict[str, Any],
    bf16: bool,
    routing: dict[str, bool],
    budgets: dict[str, Cost],
) -> None:
    (stages,) = process.run(1, cases.policy, "megatron", folders[family], config, bf16, routing)
    check(stages, budgets)


def test_transformers_trains_as_on_the_cpu(process: Ranks, folders: dict[str, Path]) -> None:
    (stages,) = process.run(1, cases.policy, "hf", folders["qwen3_tied"], {}, False, {})
    # one wait per pass is that of transformers for the mask
    check(stages, {"score": Cost(7, 4), "micro-batch": Cost(5, 4), "step": Cost(4, 0)})


@pytest.mark.parametrize(
    ("engine", "budgets"),
    [
        ("megatron", {"values": Cost(1, 8), "micro-batch": Cost(0, 4), "step": Cost(3, 0)}),
        ("hf", {"values": Cost(5, 4), "micro-batch": Cost(2, 3), "step": Cost(3, 0)}),
    ],
)
def test_critic_computes_as_on_the_cpu(
    process: Ranks, folders: dict[str, Path], engine: str, budgets: dict[str, Cost]
) -> None:
    (stages,) = process.run(1, cases.critic, engine, folders["qwen3_tied"])
    check(stages, budgets)


def test_reference_scores_as_on_the_cpu(process: Ranks, folders: dict[str, Path]) -> None:
    (stages,) = process.run(1, cases.frozen, "megatron", folders["qwen3_tied"], PACKED)
    check(stages, {"score": Cost(1, 15)})  # five of the copies are made once per set of lengths


def test_transformers_generates_as_on_the_cpu(process: Ranks, folders: dict[str, Path]) -> None:
    (stages,) = process.run(1, cases.frozen, "hf", folders["qwen3_tied"], {})
    # five tokens; two of three waits per token are the sampled ids and their log-probs
    check(stages, {"score": Cost(7, 4), "generate": Cost(16, 11)})


@pytest.mark.parametrize("engine", ["megatron", "hf"])
def test_a_tensor_that_stays_on_the_cpu_is_found(process: Ranks, folders: dict[str, Path], engine: str) -> None:
    (error,) = process.run(1, cases.planted, engine, folders["qwen3_tied"])
    assert "masking.py" in error and "tensors of the CPU" in error
