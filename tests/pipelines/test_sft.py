"""Supervised fine-tuning on plain transformers in this process, and what comes after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import REWARD, ROOT, SIZES, Outcome, checkpoints_of, computed, metrics_of, spawn

from roll_gspo.models.tiny import CHAT_TEMPLATE
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.tracking.names import METRICS

Command = Callable[..., Outcome]
SMALL = (
    *("--config-name", "example_sft", "output_dir=out", "max_steps=4", "save_steps=2", "eval_steps=2"),
    *("actor_train.data_args.num_rows=20", "validation.data_args.num_rows=8"),
    *("actor_train.training_args.per_device_train_batch_size=4", "tracker=none"),
    "actor_train.training_args.gradient_accumulation_steps=2",
)
HF = (*SMALL, "strategy=hf")
RUNS = Path("out/example_sft")


def figures(run: Path) -> list[dict[str, Any]]:
    """Return the metrics that a seed determines."""
    return [{k: v for k, v in row.items() if k != "sft/tokens_per_s"} for row in computed(run)]


def test_loss_falls_on_the_embedded_task(command: Command) -> None:
    rows, batch = "actor_train.data_args.num_rows=200", "actor_train.training_args.gradient_accumulation_steps=4"
    outcome = command(*HF, rows, batch, "max_steps=30", "save_steps=30", "eval_steps=15", "run_name=falls")
    assert outcome.code == 0, outcome.out + outcome.err
    run = RUNS / "falls"
    found = metrics_of(run)
    assert [row["step"] for row in found] == list(range(31))
    assert found[1]["sft/loss"] > 5 > 2.7 > found[30]["sft/loss"]
    assert found[0]["validation/loss"] > 5 > 2.7 > found[30]["validation/loss"]
    assert all(set(row) <= {"step", *METRICS} and None not in row.values() for row in found)
    assert found[30]["data/epoch"] == 2 and found[30]["actor/lr"] < found[20]["actor/lr"]
    assert "step 30/30  loss " in outcome.out and "validation before training: 5." in outcome.out
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Supervised loss" in report and "Gradient norm" in report


def test_interrupted_run_goes_on_bit_for_bit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(*HF, "run_name=whole").code == 0
    update = SftActor.update

    def signalled(self: SftActor, batch: Any, step: int, progress: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
        return update(self, batch, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(SftActor, "update", signalled)
        outcome = command(*HF, "run_name=stopped")
    assert outcome.code == 130 and "stopped after step 3 of 4 and saved" in outcome.out
    assert checkpoints_of(RUNS / "stopped") == ["step_000002", "step_000003"]
    resumed = command(*HF, "run_name=stopped", "resume_from_checkpoint=true")
    assert resumed.code == 0 and "resumed after step 3" in resumed.out
    assert figures(RUNS / "stopped") == figures(RUNS / "whole")
    ends = [(RUNS / name / "checkpoints/step_000004/actor_train_hf/model.safetensors") for name in ("whole", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    again = ("actor_train.data_args.num_rows=24", "run_name=stopped", "resume_from_checkpoint=true")
    other = command(*HF, *again, "resume_with_changes=true")
    assert other.code == 1 and "the data has 24" in other.err


def test_reinforcement_learning_starts_from_what_it_leaves(command: Command) -> None:
    outcome = command(*HF, "max_steps=2", "run_name=cold")
    model = RUNS / "cold/checkpoints/step_000002/actor_train_hf"
    assert f"pretrain={model}" in outcome.out
    reward = f"rewards.column_addition.worker_cls={REWARD}"
    rl = command(
        "--config-name",
        "example_gspo",
        "strategy=hf",
        *SIZES,
        "output_dir=out",
        reward,
        f"pretrain={model}",
        "max_steps=2",
        "run_name=rl",
    )
    assert rl.code == 0, rl.out + rl.err
    rows = metrics_of(Path("out/example_gspo/rl"))
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["actor/num_updates"] == 4
    again = command(*HF, "max_steps=1", f"pretrain={model}", "run_name=again")
    assert again.code == 0
    first, last = metrics_of(RUNS / "again")[0], metrics_of(RUNS / "cold")[-1]
    assert first["validation/loss"] == pytest.approx(last["validation/loss"], rel=1e-6), "the same model"


def test_own_conversations_of_several_turns(command: Command, workplace: Path) -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d"))
    ]
    rows = [{"messages": turns}, {"prompt": "x", "response": "yy"}, {"question": "long", "answer": "z" * 40}]
    (workplace / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("actor_train.data_args={file_name: chat.jsonl}", "validation=null", "sequence_length=20")
    sizes = ("actor_train.training_args.per_device_train_batch_size=2", "max_steps=2")
    small = [argument for argument in HF if not argument.startswith("validation")]
    outcome = command(*small, *data, *sizes, "actor_train.training_args.gradient_accumulation_steps=1", "run_name=own")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "chat.jsonl: dropped 1 of 3 " in outcome.out and "sequence_length 20 (longest 47 tokens)" in outcome.out
    rows = metrics_of(RUNS / "own")
    assert [row["step"] for row in rows] == [1, 2], "no validation, no step 0"
    assert [row["sft/num_tokens"] for row in rows] == [8, 8], "bb, d and yy, each with its end"
    assert rows[0]["data/sequences_dropped"] == 1

    (workplace / "chat.jsonl").write_text('{"prompt": "x"}\n')
    outcome = command(*small, *data, "run_name=bad")
    assert outcome.code == 2 and "chat.jsonl:1: no response" in outcome.err
    missing = command(*HF, "actor_train.data_args.file_name=none.jsonl", "run_name=missing")
    assert missing.code == 2 and "none.jsonl cannot be read" in missing.err


def test_rows_in_a_named_template_and_the_best_checkpoint(command: Command, workplace: Path) -> None:
    rows = [{"query": "x", "response": "y", "kind": kind} for kind in ("told", "other")]
    (workplace / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "told.jinja").write_text(CHAT_TEMPLATE.replace("message['content']", "message['content'] + 'ZZ'"))
    source = "{file_name: chat.jsonl, prompt: query, tag: kind, system_prompt: s}"
    data = (f"actor_train.data_args={source}", f"validation.data_args={source}", "tag_to_template={told: told.jinja}")
    sizes = ("actor_train.training_args.per_device_train_batch_size=2", "max_steps=3", "eval_steps=1", "save_steps=9")
    keep = ("checkpoint_config.keep_best=validation/loss", "checkpoint_config.keep_best_mode=min")
    small = [argument for argument in HF if "num_rows" not in argument]
    outcome = command(
        *small, *data, *sizes, *keep, "actor_train.training_args.gradient_accumulation_steps=1", "run_name=told"
    )
    assert outcome.code == 0, outcome.out + outcome.err
    found = metrics_of(RUNS / "told")
    assert [row["sft/num_tokens"] for row in found[1:]] == [6, 6, 6], "yZZ and y, each with its end"
    best = json.loads((RUNS / "told/checkpoints/best.json").read_text())
    assert best["metric"] == "validation/loss" and best["value"] == min(row["validation/loss"] for row in found[1:])
    outcome = command(*small, *data, "tag_to_template={unknown: told.jinja}", "run_name=wrong")
    assert outcome.code == 2 and "tag_to_template: no row has the tag unknown" in outcome.err


def test_export_of_a_checkpoint_is_the_model(command: Command, tmp_path: Path) -> None:
    from roll_gspo.export import export

    assert command(*HF, "max_steps=1", "run_name=exported").code == 0
    assert export(RUNS / "exported", tmp_path / "model") < 1e-4


@pytest.mark.megatron
@pytest.mark.slow
def test_megatron_trains_as_transformers_do(command: Command) -> None:
    for strategy in ("hf", "megatron"):
        assert command(*SMALL, f"strategy={strategy}", f"run_name={strategy}").code == 0
    ours, theirs = (figures(RUNS / name) for name in ("megatron", "hf"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.e2e
@pytest.mark.long
def test_killed_run_goes_on_bit_for_bit(workplace: Path) -> None:
    arguments = (*HF, "num_epochs=null", "max_steps=60", "save_steps=5", "eval_steps=30")
    assert spawn(*arguments, "run_name=whole", folder=workplace).code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "roll_gspo.run", *arguments, "run_name=killed"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    metrics, until = workplace / RUNS / "killed/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert spawn(*arguments, "run_name=killed", "resume_from_checkpoint=true", folder=workplace).code == 0
    assert figures(workplace / RUNS / "killed") == figures(workplace / RUNS / "whole")


@pytest.mark.megatron
@pytest.mark.e2e
@pytest.mark.long
def test_two_ranks_of_ray_train_as_one_process_does(workplace: Path) -> None:
    assert spawn(*SMALL, "run_name=one", folder=workplace).code == 0
    outcome = spawn(*SMALL, "layout=two_ranks", "run_name=two", folder=workplace)
    assert outcome.code == 0, outcome.out + outcome.err
    for one, two in zip(figures(workplace / RUNS / "one"), figures(workplace / RUNS / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
