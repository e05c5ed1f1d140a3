"""The mismatch gate: both actions, what it compares, and that every process measures anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of
from composed import load_config

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import ConfigError, TrainingError
from roll_gspo.pipelines.rlvr.mismatch_gate import MismatchGate
from roll_gspo.pipelines.rlvr.transfer_check import Mismatch, check_transfer
from roll_gspo.strategies.base import Sampling

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUN = Path("out/example_gspo/run")
BOUND = "max_kl: 1.0e-30"


def gate(action: str, *overrides: str) -> MismatchGate:
    config = load_config("example_gspo", f"mismatch_gate={{max_kl: 0.01, action: {action}}}", *overrides).config
    assert isinstance(config, ExperimentConfig)
    return MismatchGate(config)


def test_measured_kl_is_that_of_the_engine_to_the_trainer() -> None:
    rollouts = Rollouts.collate(
        [Prompt((1,), "a", {})] * 2,
        [[Completion((5, 6), (-1.0, -2.0), "stop")], [Completion((7,), (-3.0,), "stop")]],
        pad=0,
        weights_version=0,
    )
    own = rollouts.rollout_log_probs + 0.1
    found = check_transfer(rollouts, own, Sampling(1, 4), "bf16", "fp32")
    assert found is not None
    assert found.kl == pytest.approx(math.exp(0.1) - 1.1, rel=1e-5)
    assert (found.mean, found.largest) == (pytest.approx(0.1), pytest.approx(0.1))
    assert check_transfer(rollouts, own, Sampling(1, 4, top_p=0.9), "fp32") is None


@pytest.mark.parametrize("kl", [0.02, math.nan])
def test_gate_stops_or_warns_with_likely_causes(kl: float, caplog: pytest.LogCaptureFixture) -> None:
    found = Mismatch(kl, 0.1, 0.5)
    different = ("actor_train.model_args.dtype=bf16", "actor_infer.model_args.dtype=fp32")
    with pytest.raises(TrainingError) as caught:
        gate("stop", *different).check(7, found)
    message = str(caught.value)
    assert message.startswith("step 7: mismatch_gate.max_kl: ") and f"is {kl:.3g} nats per token" in message
    assert "* actor_train computes in bf16, actor_infer in fp32" in message
    for cause in ("router_replay=R3", "quantization", "enforce_eager", "weight_transfer.checksum"):
        assert cause in message
    gate("warn").check(1, found)
    assert "above 0.01" in caplog.text and "computes in" not in caplog.text, "equal dtypes are no cause"


def test_open_gate_and_no_gate_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    gate("stop").check(1, Mismatch(0.01, 0.1, 0.5))
    config = load_config("example_gspo", "mismatch_gate=null").config
    assert isinstance(config, ExperimentConfig)
    MismatchGate(config).check(1, Mismatch(9.0, 0.1, 0.5))
    assert not caplog.records


def test_stop_needs_log_probs_of_the_whole_distribution() -> None:
    cut = "actor_infer.generating_args.top_p=0.9"
    with pytest.raises(ConfigError, match=r"mismatch_gate\.action.*top_p 0\.9"):
        load_config("example_gspo", cut, "mismatch_gate.action=stop")
    load_config("example_gspo", cut)


def test_every_process_measures_before_its_first_update(command: Command, small: tuple[str, ...]) -> None:
    """Float32 engines differ by rounding only, which a bound of 1e-30 does not allow."""
    outcome = command(*HF, *small, "max_steps=2", "run_name=run", f"mismatch_gate={{{BOUND}, action: warn}}")
    assert outcome.code == 0 and outcome.out.count("mismatch_gate.max_kl") == 1
    assert "step 1: mismatch_gate.max_kl" in outcome.out
    row = metrics_of(RUN)[1]
    assert 0 < row["mismatch/kl"] < 1e-6 and row["actor/ratio_noise"] < 1e-5
    assert row["actor/clip_distance"] == pytest.approx(3e-4, rel=1e-3) and 0 < row["mismatch/ratio_rms"] < 1e-5

    stop = f"mismatch_gate={{{BOUND}, action: stop}}"
    resumed = command(*HF, *small, "max_steps=4", "run_name=run", "resume_from_checkpoint=true", stop)
    assert resumed.code == 1 and "step 3: mismatch_gate.max_kl" in resumed.err + resumed.out
    assert len(metrics_of(RUN)) == 3, "step 3 trained nothing"
