"""The shipped example on Megatron and vLLM: the files of a run, and resuming after a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import yaml
from commands import (
    REWARD,
    REWARD_MODULE,
    SIZES,
    Outcome,
    checkpoints_of,
    computed,
    metrics_of,
    rollouts_of,
)
from forked_command import train

from roll_gspo.tracking.names import metric_info

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.slow]

EXAMPLE = ("--config-name", "example_gspo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default_engines")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    return folder


@pytest.fixture(scope="module")
def arguments(pretrained: Path) -> tuple[str, ...]:
    reward = f"rewards.column_addition.worker_cls={REWARD}"
    return (*EXAMPLE, *SIZES, f"pretrain={pretrained}", reward, "output_dir=out")


@pytest.fixture(scope="module")
def whole(folder: Path, arguments: tuple[str, ...]) -> tuple[Outcome, Path]:
    """A run of four steps without interruption."""
    outcome = train(*arguments, "run_name=whole", folder=folder)
    assert outcome.code == 0, outcome.err
    return outcome, folder / "out/example_gspo/whole"


def test_run_writes_every_documented_file(whole: tuple[Outcome, Path]) -> None:
    outcome, run = whole
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "plan.txt", "metrics.jsonl", "rollouts", "tensorboard", "run.log", "launches.jsonl"),
        *("checkpoints", "report.html", "validation", "updated_log_probs"),
    }
    assert list(rollouts_of(run)) == [1, 2, 3, 4]
    assert all(any("updated_log_probs" in s for s in samples) for samples in rollouts_of(run).values())
    assert checkpoints_of(run) == ["step_000002", "step_000004"]
    assert all(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert outcome.out.startswith((run / "plan.txt").read_text())
    assert "step 4/4" in outcome.out and f"report: {run.relative_to(run.parents[2])}" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err


def test_metrics_are_documented_and_stage_times_add_up(whole: tuple[Outcome, Path]) -> None:
    rows = metrics_of(whole[1])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert all(metric_info(name) for name in set(row) - {"step"})
        stages = [v for k, v in row.items() if k.startswith("time/") and k != "time/step"]
        assert sum(stages) == pytest.approx(row["time/step"], abs=1e-9)
        assert row["actor/num_updates"] == 4 and row["actor/skipped_updates"] == 0
        assert 0 < row["actor/clip_fraction"] < 1, "the sequence clip is active"
        assert row["mismatch/log_prob_diff_mean"] < 1e-4, "both engines compute the same policy"
        assert row["actor/entropy"] > 0
        assert row["rollout/weights_version"] == row["step"] - 1
    assert "validation/score_mean" in rows[0] and "validation/score_mean" in rows[4]


def test_config_of_a_run_gives_the_same_plan(whole: tuple[Outcome, Path], folder: Path) -> None:
    run = whole[1]
    again = train("--config-dir", str(run), "--config-name", "config", "run_name=again", "--dry-run", folder=folder)
    assert (again.code, again.out) == (0, (run / "plan.txt").read_text()), again.err


def test_killed_run_resumes_to_the_same_result(
    whole: tuple[Outcome, Path], folder: Path, arguments: tuple[str, ...]
) -> None:
    # Two validations of 16 samples and 32 samples per step: this sample is scored in step 4.
    kill = f"rewards.column_addition.worker_args={{at: [{32 + 3 * 32 + 5}], number: {signal.SIGKILL:d}}}"
    killed = train(*arguments, "run_name=killed", kill, folder=folder)
    run = folder / "out/example_gspo/killed"
    assert killed.code == -signal.SIGKILL
    assert [row["step"] for row in metrics_of(run)] == [0, 1, 2, 3]
    assert checkpoints_of(run) == ["step_000002"]
    (run / "checkpoints/.step_000003.99.tmp").mkdir()  # left by a kill during a save
    resumed = train(
        *arguments, "run_name=killed", "resume_from_checkpoint=true", "resume_with_changes=true", folder=folder
    )
    assert resumed.code == 0, resumed.err
    assert "resumed after step 2" in resumed.out
    assert computed(run) == computed(whole[1])
    assert rollouts_of(run) == rollouts_of(whole[1])
    assert checkpoints_of(run) == ["step_000002", "step_000004"]


def test_exported_model_is_the_trained_one(whole: tuple[Outcome, Path], pretrained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from roll_gspo.batch import Sequences
    from roll_gspo.strategies.base import ModelSetup, OptimizerSetup
    from roll_gspo.strategies.megatron.config import MegatronConfig
    from roll_gspo.strategies.megatron.engine.train import MegatronTrain

    saved = whole[1] / "checkpoints/step_000004"
    export = saved / "actor_train_hf"
    tokenizer = AutoTokenizer.from_pretrained(export)
    prompt, response = tokenizer.encode("<|user|>12+34=<|assistant|>"), tokenizer.encode("2+4+0=6,1+3+0=4:46<|end|>")
    setup = ModelSetup(pretrained, torch.float32, 4, temperature=1.0, seed=0)
    trainer = MegatronTrain(setup, OptimizerSetup(1e-4, total_steps=16, max_grad_norm=1.0), MegatronConfig())
    batch = Sequences.collate([prompt], [response], pad=0)
    before = trainer.score(batch).log_probs
    trainer.load(saved / "actor_train")
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)(input_ids=ids).logits
    found = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(found[None], trainer.score(batch).log_probs, rtol=0, atol=1e-5)
    assert (found - before[0]).abs().max() > 1e-3, "training changed the model"


def test_mixture_of_experts_resumes_after_ctrl_c(folder: Path) -> None:
    reward = "rewards.column_addition"
    arguments = (
        *(
            *EXAMPLE,
            *(size for size in SIZES if not size.startswith(("validation", "warm_start"))),
            "validation=null",
            "model=tiny_qwen3_moe",
            "warm_start.steps=20",
            "max_steps=2",
            "exp_name=moe",
        ),
        *(f"{reward}.worker_cls={REWARD}", "output_dir=out", "run_name=moe"),
    )
    stopped = train(
        *arguments, f"{reward}.worker_args={{at: [5], number: {signal.SIGINT:d}, group: true}}", folder=folder
    )
    assert stopped.code == 130, stopped.err
    assert "stopped after step 1 of 2 and saved" in stopped.out and "weight transfer checked" in stopped.out
    outcome = train(*arguments, "resume_from_checkpoint=true", "resume_with_changes=true", folder=folder)
    assert outcome.code == 0, outcome.err
    assert "weight transfer checked" in outcome.out
    run = folder / "out/moe/moe"
    rows = metrics_of(run)
    assert [row["actor/num_updates"] for row in rows] == [4, 4]
    # Step 2 agrees as well, so the weights of step 1 reached every expert of the engine.
    assert rows[1]["mismatch/log_prob_diff_mean"] < 1e-4
    assert yaml.safe_load((run / "config.yaml").read_text())["pretrain"] == "builtin:tiny_qwen3_moe"
    assert "Traceback" not in stopped.out + stopped.err + outcome.out + outcome.err
