"""Presets on Megatron and vLLM, and a resumed PPO run with dynamic sampling."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from commands import REWARD, REWARD_MODULE, SIZES, checkpoints_of, computed, metrics_of, rollouts_of
from forked_command import train

from roll_gspo.run import shipped_folders
from roll_gspo.tracking.names import metric_info

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.slow]

OTHERS = {
    "example_sft",
    "example_multi_domain",
    "example_agentic_gspo",
    "example_tool_use",
}  # another pipeline, other tasks
# Dynamic sampling runs here. The losses, estimators and critic of the other presets run on transformers in
# tests/pipelines/test_rlvr.py, and here with `long`.
IN_EVERY_RUN = {"example_dapo"}
EXAMPLES = sorted({file.stem for file in shipped_folders()[0].glob("example_*.yaml")} - OTHERS)
PPO = ("critic.training_args.per_device_train_batch_size=8", "critic.training_args.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    return folder


@pytest.fixture(scope="module")
def arguments(pretrained: Path) -> tuple[str, ...]:
    reward = f"rewards.column_addition.worker_cls={REWARD}"
    return (*SIZES, f"pretrain={pretrained}", reward, "output_dir=out")


def test_every_preset_has_an_example() -> None:
    presets = {file.stem for file in (shipped_folders()[1] / "algorithm").glob("*.yaml")}
    short = {"reinforce_plus_plus": "reinforce_pp", "raft_plus_plus": "raft_pp"}  # as ROLL names its examples
    assert {f"example_{short.get(name, name)}" for name in presets} == set(EXAMPLES)


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.long) for name in EXAMPLES]
)
def test_example_trains(folder: Path, arguments: tuple[str, ...], example: str) -> None:
    critic = PPO if example == "example_ppo" else ()
    outcome = train("--config-name", example, *arguments, *critic, "max_steps=2", "run_name=run", folder=folder)
    assert outcome.code == 0, outcome.out[-3000:] + outcome.err
    rows = metrics_of(folder / "out" / example / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert all(metric_info(name) for name in set(row) - {"step"})
        assert None not in row.values(), "everything is finite"
        assert row["actor/num_updates"] == 4 and row["actor/grad_norm"] > 0
        assert row["mismatch/log_prob_diff_mean"] < 1e-4, "always measured"
    critic = [row for row in rows[1:] if "critic/loss" in row]
    assert len(critic) == (2 if example == "example_ppo" else 0)


def without_rounding(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return metrics without those that compare log-probs of engine and trainer."""
    return [{name: value for name, value in row.items() if not name.startswith("mismatch/")} for row in rows]


@pytest.mark.parametrize("engines", ["strategy=hf", pytest.param("strategy=megatron", marks=pytest.mark.long)])
def test_resumed_ppo_with_dynamic_sampling_equals_an_uninterrupted_run(
    folder: Path, arguments: tuple[str, ...], engines: str
) -> None:
    name = f"exp_name={engines}".replace("strategy=", "")
    run = (
        *("--config-name", "example_ppo", engines, *arguments, *PPO, name, "reward_norm=running", "critic_warmup=1"),
        *("query_filter=mean_filter", "query_filter_config.filter_args.threshold_down=0.55", "max_sampling_rounds=2"),
    )
    runs = folder / "out" / engines.removeprefix("strategy=")
    # Sent while step 2 is scored, after 16 validation samples and 32 or 64 samples of step 1.
    stop = f"rewards.column_addition.worker_args={{at: [90], number: {signal.SIGTERM:d}}}"
    assert train(*run, "run_name=whole", folder=folder).code == 0
    outcome = train(*run, "run_name=stopped", stop, folder=folder)
    assert outcome.code == 128 + signal.SIGTERM, outcome.out + outcome.err
    assert checkpoints_of(runs / "stopped"), "the step was finished and saved"
    again = ("run_name=stopped", "resume_from_checkpoint=true", "resume_with_changes=true")  # without the signal
    assert train(*run, *again, folder=folder).code == 0
    whole, resumed = (runs / name for name in ("whole", "stopped"))
    # Replacements are admitted as soon as a group is rejected, so that rows decode in other company. This changes the
    # last digit of the log-probs of `hf_infer`, which only the comparison with the trainer uses.
    assert without_rounding(computed(resumed)) == without_rounding(computed(whole))
    for step, samples in rollouts_of(whole).items():
        for sample, other in zip(samples, rollouts_of(resumed)[step], strict=True):
            log_probs = sample.pop("rollout_log_probs")
            assert other.pop("rollout_log_probs") == pytest.approx(log_probs, abs=1e-4)
            assert sample == other
    rows = metrics_of(whole)[1:]
    assert rows[0]["actor/num_updates"] == 0 and rows[0]["critic/num_updates"] == 4, "critic warm-up"
    assert rows[1]["actor/num_updates"] == 4
    assert any(row["sampling/groups_dropped"] > 0 for row in rows)
