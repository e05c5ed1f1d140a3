"""Memory really leaves the device: the bytes behind all of its tensors are counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import offload_cases
from ranks import Ranks
from tiny_models import write_model

pytestmark = pytest.mark.megatron

CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, float]] = {
    # bytes of gradients, master weights and moments per byte of a parameter
    "hf": ("hf", {}, torch.float32, 2),
    "megatron": ("megatron", {}, torch.float32, 3),
    "megatron bf16": ("megatron", {}, torch.bfloat16, 8),
    "distributed optimizer": ("megatron", {"use_distributed_optimizer": True}, torch.bfloat16, 8),
}


@pytest.fixture(scope="module")
def process() -> Iterator[Ranks]:
    """A process whose PrivateUse1 backend is the fake device."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.mark.parametrize("name", CASES)
def test_memory_leaves_the_device(process: Ranks, tmp_path: Path, name: str) -> None:
    engine, config, dtype, state = CASES[name]
    folder = write_model(tmp_path, "qwen3_tied")
    (found,) = process.run(1, offload_cases.leaving, folder, engine, config, dtype)
    parameters = found["parameters"]
    # positions of the last pass and other small tensors stay
    assert found["OFFLOADED"] < 0.05 * parameters
    assert found["WEIGHTS"] == pytest.approx(parameters, rel=0.05)
    assert found["FULL"] == pytest.approx((1 + state) * parameters, rel=0.05)
    assert found["again"] == pytest.approx(found["FULL"], rel=0.01)
