"""Metrics of validation: groups, failed rewards, several samples per prompt, and the best checkpoint in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, checkpoints_of, computed, metrics_of, rollouts_of

from roll_gspo.batch import Prompt
from roll_gspo.checkpoint import read_best
from roll_gspo.config.roles import DataArgs, GeneratingArgs
from roll_gspo.config.validation import ValidationConfig
from roll_gspo.errors import DataError
from roll_gspo.pipelines.rlvr.datasets import group_of, read_validation
from roll_gspo.pipelines.rlvr.validation import Answers, metric_names, summaries, validation_metrics
from roll_gspo.rollout_files import read_samples, step_path
from roll_gspo.tracking.names import metric_info

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf", "run_name=run")
RUN = Path("out/example_gspo/run")
SAMPLES = ("validation.generating_args.num_return_sequences=3", "validation.metrics_k=[1,3]")


def block(num_samples: int = 2, attempts: tuple[int, ...] = (1, 2), **keys: object) -> ValidationConfig:
    return ValidationConfig(
        data_args=DataArgs(file_name=("x.jsonl",)),
        generating_args=GeneratingArgs(num_return_sequences=num_samples),
        metrics_k=attempts,
        **keys,  # type: ignore[arg-type]
    )


def prompt(group: str, *scores: float, answers: tuple[str | None, ...] | None = None, failed: int = 0) -> Answers:
    return Answers(group, scores, answers or (None,) * len(scores), failed, (4,) * (len(scores) + failed), 1)


def test_figures_by_group_and_over_all() -> None:
    prompts = [
        prompt("aime", 1, 0, answers=("7", "8")),
        prompt("math", 1, 1, answers=("1", "1")),
        prompt("math", 0, 0, answers=("2", None)),
    ]
    aime, math_500, total = summaries(prompts, block())
    assert [s.group for s in (aime, math_500, total)] == ["aime", "math", "all"]
    assert (aime.average and aime.average.mean, aime.pass_at[1].mean, aime.pass_at[2].mean) == (0.5, 0.5, 1.0)
    assert aime.maj_at[2].mean == 0.5, "a tie"
    assert (math_500.average and math_500.average.mean, math_500.pass_at[2].mean) == (0.5, 0.5)
    assert (total.num_prompts, total.num_scored, total.score_mean) == (3, 6, 0.5)
    assert total.pass_at[2].mean == pytest.approx(2 / 3) and total.truncated_fraction == 0.5
    metrics = validation_metrics([aime, math_500, total])
    assert metrics["validation/aime/pass@2"] == 1 and metrics["validation/score_mean"] == 0.5
    assert metrics["validation/all/avg@2_low"] < 0.5 < metrics["validation/all/avg@2_high"]
    assert all(metric_info(name) for name in metrics)
    data = [Prompt((1,), "", {"source": name}) for name in ("aime", "math", "math")]
    assert set(metric_names(data, block())) <= set(metrics)


def test_failed_rewards_are_left_out_and_counted() -> None:
    prompts = [prompt("a", 1, failed=1), prompt("a", 0, 1), prompt("b", failed=2)]
    a, b, total = summaries(prompts, block())
    assert (a.num_scored, a.num_failed, a.score_mean) == (3, 1, pytest.approx(2 / 3))
    assert a.average is not None and a.average.mean == 0.75, "the mean over prompts of their means"
    assert a.pass_at[2].mean == 1.0, "only the prompt with two scored samples counts"
    assert (b.average, dict(b.pass_at), dict(b.maj_at)) == (None, {}, {}) and math.isnan(b.score_mean)
    assert validation_metrics([a, b, total])["validation/failed"] == 3


def test_no_majority_without_answers_and_correct_is_a_score() -> None:
    (alone, _) = summaries([prompt("a", 0.6, 0.4)], block(correct_score=0.5))
    assert dict(alone.maj_at) == {} and alone.pass_at[1].mean == 0.5
    (all_group, _) = summaries([prompt("all", 1, 1)], block())
    assert all_group.group == "all"
    from roll_gspo.pipelines.rlvr.validation import _label

    assert _label({"source": "all"}, "source") == "source_all", "no group can replace the metrics over all"


def test_sources_are_taken_before_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "ground_truth": "1", "source": "ab"[i % 2], "domain": "d"} for i in range(6)]
    rows += [{"prompt": "q", "ground_truth": "1"}, {"prompt": "r", "ground_truth": "1", "tag": "t"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(**keys: object) -> list[str]:
        args = DataArgs(file_name=(str(path),), num_rows=2, domain="rest")
        found = read_validation(ValidationConfig(data_args=args, **keys))  # type: ignore[arg-type]
        return [f"{row.messages[0]['content']} {row.domain}" for row in found]

    assert read(sources="b") == ["p1 d", "p3 d"]
    assert read(sources="rest") == ["q rest"], "a row that has its domain from data_args goes by it"
    assert read(sources="rows") == ["r "], "any other without a source by its file"
    assert read(group_by="domain", sources=["d", "rest"]) == ["p0 d", "p1 d"]
    with pytest.raises(DataError, match=r"validation.sources: no row has the source c \(there are a, b, rest, rows\)"):
        read(sources=["a", "c"])
    assert group_of({"tag": "t"}, "source") == "t" and group_of({"tag": "t"}, "domain") == "unlabelled"


def test_batches_change_no_sample_and_the_best_checkpoint_is_kept(
    command: Command, small: tuple[str, ...], tmp_path: Path
) -> None:
    keep = (
        *("checkpoint_config.keep_best=validation/all/avg@3", "checkpoint_config.max_ckpt_to_keep=1"),
        *("eval_steps=1", "save_steps=2", "max_steps=4"),
    )
    outcome = command(*HF, *small, *SAMPLES, *keep, "checkpoint_config.keep_best_mode=min")
    assert outcome.code == 0, outcome.out + outcome.err
    rows = metrics_of(RUN)
    assert [row["validation/num_samples"] for row in rows] == [48.0] * 5, "before, in and after training"
    figures = [row["validation/all/avg@3"] for row in rows]
    assert figures == pytest.approx([row["validation/score_mean"] for row in rows])
    lowest = min(range(1, 5), key=lambda step: figures[step])
    best = read_best(RUN / "checkpoints")
    assert best is not None and (best.step, best.value) == (lowest, figures[lowest])
    assert checkpoints_of(RUN) == sorted({"best.json", f"step_{lowest:06d}", "step_000004"})
    samples = read_samples(step_path(RUN / "validation", 4)).samples
    assert [sample["group"] for sample in samples] == [i for i in range(16) for _ in range(3)]
    assert {sample["advantage"] for sample in samples} == {None}
    assert sum(s["score"] for s in samples) / 48 == pytest.approx(figures[4])
    before = (computed(RUN), rollouts_of(RUN))
    again = command(*HF, *small, *SAMPLES, *keep, "validation.batch_size=5", "exp_name=again")
    assert again.code == 0, again.out + again.err
    other = RUN.parents[1] / "again/run"
    by_max = [row["validation/all/avg@3"] for row in metrics_of(other)]
    assert (computed(other), rollouts_of(other)) == before, "how many prompts are taken at once changes nothing"
    assert read_best(other / "checkpoints").step == max(range(1, 5), key=lambda step: by_max[step])  # type: ignore[union-attr]


def test_best_survives_a_stop_and_unknown_figure_is_named(command: Command, small: tuple[str, ...]) -> None:
    keep = ("checkpoint_config.keep_best=validation/score_mean", "eval_steps=1", "save_steps=4")
    assert command(*HF, *small, *keep, "max_steps=2").code == 0
    first = read_best(RUN / "checkpoints")
    assert first is not None
    (RUN / "checkpoints/best.json").unlink()  # as a kill between the checkpoint and its mark leaves it
    resumed = command(*HF, *small, *keep, "max_steps=3", "resume_from_checkpoint=true")
    assert resumed.code == 0, resumed.out + resumed.err
    figures = [row["validation/score_mean"] for row in metrics_of(RUN)]
    best = read_best(RUN / "checkpoints")
    assert best is not None and best.value == max(figures[1:]) and figures[best.step] == best.value
    wrong = command(*HF, *small, "exp_name=wrong", "checkpoint_config.keep_best=validation/all/avg@7")
    assert wrong.code == 2
    assert "checkpoint_config.keep_best: no figure 'validation/all/avg@7'; choose one of validation/score" in wrong.err
    assert not (RUN.parents[1] / "wrong/run/validation").exists(), "said before anything is generated"
