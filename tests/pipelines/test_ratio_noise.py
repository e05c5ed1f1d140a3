"""The noise of the ratio against the clip range: the plan's row, and warnings of a run."""

from __future__ import annotations

import math

import pytest
from composed import load_config

from roll_gspo.config.clip_range import nearest_log_bound
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.pipelines.rlvr.ratio_noise import RatioNoiseAlarm, clip_distance, remedies

BF16 = ("strategy=hf", "actor_train.model_args.dtype=bf16")


def config_of(*overrides: str, name: str = "example_gspo_paper") -> ExperimentConfig:
    config = load_config(name, *overrides).config
    assert isinstance(config, ExperimentConfig)
    return config


def noise_rows(*overrides: str) -> list[str]:
    return [text for label, text in make_plan(config_of(*overrides)).rows if label == "noise"]


@pytest.mark.parametrize(
    ("low", "high", "scaled", "expected"),
    [
        (3e-4, 4e-4, False, -math.log(1 - 3e-4)),
        (0.5, 0.1, False, math.log(1.1)),
        (1.0, 4.0, False, math.log(5)),  # cispo: no lower bound
        (0.03, 0.02, True, 0.02),
    ],
)
def test_distance_is_that_of_the_nearer_bound_in_log_space(
    low: float, high: float, scaled: bool, expected: float
) -> None:
    assert nearest_log_bound(low, high, scaled) == pytest.approx(expected, rel=1e-12)


def test_distance_follows_the_loss() -> None:
    assert clip_distance(config_of()) == pytest.approx(3e-4, rel=1e-3)
    assert clip_distance(config_of("algorithm=fspo")) == 0.03
    assert clip_distance(config_of("algorithm=sapo")) is None


def test_plan_compares_the_expected_noise_with_the_clip_range() -> None:
    first, second = noise_rows(*BF16, "response_length=100")
    assert first.startswith("bf16 moves ratios by about 1.3e-03 at 100 tokens per response")
    assert "4.3 × the clip range 0.0003" in first
    assert "pg_clip_low" in second and "train in fp32" in second
    (token,) = noise_rows(*BF16, "importance_sampling=token")
    assert "1.3e-02 per token" in token and "0.058 × the clip range 0.2" in token
    assert noise_rows(*BF16, "algorithm=sapo") == [] == noise_rows("strategy=hf"), "no range; float32"


def warnings_of(caplog: pytest.LogCaptureFixture, alarm: RatioNoiseAlarm, values: list[float]) -> list[int]:
    """Return the steps that warn, for one noise per step."""
    caplog.clear()
    for step, value in enumerate(values, start=1):
        assert alarm.check(step, {"actor/ratio_noise": value})["actor/clip_distance"] == pytest.approx(3e-4, rel=1e-3)
    return [int(record.getMessage().split()[1].rstrip(":")) for record in caplog.records]


def test_noise_above_a_third_warns_at_doubling_intervals(caplog: pytest.LogCaptureFixture) -> None:
    alarm = RatioNoiseAlarm(config_of(*BF16))
    assert warnings_of(caplog, alarm, [1.1e-4] * 9) == [1, 2, 4, 8]
    message = caplog.records[0].getMessage()
    assert "actor/ratio_noise 0.00011 is 0.37 × the clip range 0.0003" in message
    assert all(remedy in message for remedy in remedies(config_of(*BF16)))
    assert warnings_of(caplog, alarm, [9e-5, 9e-5, 2e-4]) == [3], "a quiet step ends the count"


def test_larger_of_both_measures_decides(caplog: pytest.LogCaptureFixture) -> None:
    alarm = RatioNoiseAlarm(config_of(*BF16))
    alarm.check(1, {"actor/ratio_noise": 2e-4, "mismatch/ratio_rms": 1.5e-3})
    assert "step 1: mismatch/ratio_rms 0.0015 is 5 × the clip range 0.0003" in caplog.text
    assert alarm.check(2, {"reward/mean": 1.0}) == {}, "a step without an update"
    assert RatioNoiseAlarm(config_of("algorithm=sapo")).check(1, {"actor/ratio_noise": 1.0}) == {}
