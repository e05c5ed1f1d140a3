"""The noise of the importance ratio: values by hand, and independence from the split into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.ratio_noise import engine_ratio, ratio_rms
from roll_gspo.algorithms.staleness import lag_buckets
from roll_gspo.declarations import ImportanceRatio
from roll_gspo.metrics import merge, to_floats

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
OLD = torch.tensor([[-1.0, -2.0, math.nan, -0.5], [-3.0, 0, 0, 0], [0, 0, 0, 0]])
MOVED = torch.tensor([[1.0, 2.0, 0, -6.0], [4.0, 0, 0, 0], [0, 0, 0, 0]]) / 1024  # exact in float32
GSPO = PolicyLossSettings("seq", 3e-4, 4e-4, None, "seq-mean-token-mean", 4)


def rms(log_probs: Tensor, **changes: object) -> float:
    return to_floats({"x": ratio_rms(log_probs, OLD, MASK, replace(GSPO, **changes))})["x"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "squares"),
    [
        ({"importance_sampling": "token"}, [1, 4, 36, 16]),
        ({}, [1, 16]),  # sample 1: (1 + 2 - 6) / 3 = -1
        ({"importance_sampling": "seq_token"}, [1, 16]),
        # turns of sample 1: a mean of 1.5 over two tokens, and -6
        ({"importance_sampling": "segment"}, [(2 * 1.5**2 + 36) / 3, 16]),
        ({"pg_clip_length_scaling": True}, [3, 16]),  # (-3)^2 / 3, 4^2 / 1
        ({"policy_loss": "fspo", "importance_sampling": "token"}, [3, 16]),
        ({"policy_loss": "gmpo", "importance_sampling": "token"}, [1, 4, 36, 16]),
    ],
)
def test_noise_is_the_rms_at_the_level_of_the_loss(changes: Mapping[str, object], squares: list[float]) -> None:
    assert rms(OLD + MOVED, **changes) == pytest.approx(math.sqrt(sum(squares) / len(squares)) / 1024, rel=1e-6)


@pytest.mark.parametrize("level", ["token", "seq", "segment"])
def test_equal_log_probs_have_no_noise_and_masked_samples_do_not_count(level: str) -> None:
    assert rms(OLD, importance_sampling=level) == 0
    nothing = ratio_rms(OLD + 1, OLD, torch.zeros_like(MASK), GSPO)
    assert (float(nothing.value), float(nothing.weight)) == (0, 0)


def test_noise_far_below_float32_of_a_ratio_is_measured() -> None:
    old = torch.full((1, 2), -(2.0**-10))
    new = old + torch.tensor([[2.0**-32, 2.0**-32]])
    found = to_floats({"x": ratio_rms(new, old, torch.ones(1, 2, dtype=torch.bool), GSPO)})["x"]
    assert found == pytest.approx(2.0**-32, rel=1e-6), "1 + 2^-32 is 1 in float32"


@pytest.mark.parametrize("level", ["token", "seq", "segment"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_noise_of_parts_is_that_of_the_whole(level: str, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    old, moved = torch.randn(2, 16, 9, generator=generator)
    mask = torch.rand(16, 9, generator=generator) < 0.6
    settings = replace(GSPO, importance_sampling=level)
    whole = to_floats({"x": ratio_rms(old + moved / 1000, old, mask, settings)})["x"]
    parts = [
        {"x": ratio_rms((old + moved / 1000)[rows], old[rows], mask[rows], settings)}
        for rows in torch.randperm(16, generator=generator).split(size)
    ]
    assert to_floats(merge(parts))["x"] == pytest.approx(whole, rel=1e-5)


@ImportanceRatio(scale="token")
def squared_ratio(log_ratio: Tensor, response_mask: Tensor, *, power: float) -> Tensor:
    return (power * log_ratio).exp()


def test_own_ratio_counts_by_its_declared_scale() -> None:
    path = f"{__name__}.squared_ratio"
    found = rms(OLD + MOVED, importance_sampling=path, importance_sampling_args={"power": 2.0})
    assert found == pytest.approx(2 * rms(OLD + MOVED, importance_sampling="token"), rel=1e-6)


def test_engine_ratio_counts_samples_without_a_stale_token() -> None:
    def found(lags: Tensor | None) -> dict[str, float]:
        return to_floats(engine_ratio(OLD + MOVED, OLD, MASK, None if lags is None else lag_buckets(lags), GSPO))

    name = "mismatch/ratio_rms"
    assert found(None) == {name: pytest.approx(math.sqrt(17 / 2) / 1024, rel=1e-6)}
    lags = torch.zeros(3, 4, dtype=torch.int32)
    lags[0, 2] = 7  # masked
    assert found(lags) == found(None)
    lags[0, 1] = 1
    assert found(lags) == {name: pytest.approx(4 / 1024, rel=1e-6)}
    lags[1, 0] = 3
    assert found(lags) == {}
