"""python -m roll_gspo.evaluate on plain transformers: the same metrics as in the run, benchmarks, and refused input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of

import roll_gspo.evaluation
from roll_gspo.rollout_files import read_samples

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf", "output_dir=out")
RUN = Path("out/example_gspo/run")
BENCHMARKS = Path(__file__).parents[3] / "shared/data/math_benchmarks/math_benchmarks.jsonl"
SAMPLING = (
    *("validation.generating_args.num_return_sequences=2", "validation.data_args.num_rows=16", "response_length=32"),
    "rewards.column_addition.worker_cls=my_reward.digits",
)


@pytest.fixture
def evaluate(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The command in this process, in the folder of the fixture `command`."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        capfd.readouterr()
        environment, code = dict(os.environ), 0
        try:
            roll_gspo.evaluation.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        finally:
            os.environ.clear()
            os.environ.update(environment)
        return Outcome(code, *capfd.readouterr(), 0.0)

    return run


def written(folder: Path) -> dict[str, dict[str, object]]:
    """Return the metrics of evaluation.json by group."""
    return {figures["group"]: figures for figures in json.loads((folder / "evaluation.json").read_text())["figures"]}


def test_checkpoint_has_the_metrics_of_its_run(command: Command, evaluate: Command, small: tuple[str, ...]) -> None:
    extra = ("validation.generating_args.num_return_sequences=2", "max_steps=2", "run_name=run")
    trained = command("--config-name", "example_gspo", "strategy=hf", *small, *extra)
    assert trained.code == 0, trained.out + trained.err
    outcome = evaluate(*HF, *SAMPLING, f"ckpt={RUN}", "out=result", "validation.batch_size=7")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "start actor_train" not in outcome.out and "step_000002/actor_train_hf (step 2)" in outcome.out
    last = metrics_of(RUN)[-1]
    figures = written(Path("result"))
    assert figures["all"]["avg@2"]["mean"] == pytest.approx(last["validation/score_mean"])  # type: ignore[index]
    assert figures["column_addition"]["num_prompts"] == 16
    now = read_samples(Path("result/validation/step_000002.parquet")).samples
    then = read_samples(RUN / "validation/step_000002.parquet").samples
    assert [s["response_token_ids"] for s in now] == [s["response_token_ids"] for s in then], "the very same samples"
    table = Path("result/evaluation.md").read_text()
    assert table.splitlines()[2].startswith("| group") and table.splitlines()[2] in outcome.out
    again = evaluate(*HF, *SAMPLING, f"ckpt={RUN}", "out=result")
    assert again.code == 2 and "out: result holds an evaluation already" in again.err
    greedy = evaluate(
        *(*HF, *SAMPLING[1:], "validation.generating_args.temperature=0"),
        *("ckpt=" + str(RUN / "checkpoints/step_000002/actor_train_hf"), "out=greedy"),
    )
    assert greedy.code == 0 and "avg@1" in written(Path("greedy"))["all"]
    (RUN / "checkpoints/step_000002/actor_train_hf/config.json").unlink()
    bare = evaluate(*HF, *SAMPLING, f"ckpt={RUN}")
    assert bare.code == 2 and "ckpt: " in bare.err


def test_episodes_have_the_metrics_of_their_run(command: Command, evaluate: Command, small: tuple[str, ...]) -> None:
    sizes = [size for size in small if not size.startswith(("warm_start", "rewards", "response_length"))]
    name = ("--config-name", "example_agentic_gspo", "strategy=hf", "output_dir=out")
    trained = command(*name, *sizes, "max_steps=2", "run_name=run")
    assert trained.code == 0, trained.out + trained.err
    run = Path("out/example_agentic_gspo/run")
    outcome = evaluate(
        *name, "validation.data_args.num_rows=16", f"ckpt={run}", "out=result", "validation.batch_size=5"
    )
    assert outcome.code == 0, outcome.out + outcome.err
    now = read_samples(Path("result/validation/step_000002.parquet")).samples
    then = read_samples(run / "validation/step_000002.parquet").samples
    assert [s["response_token_ids"] for s in now] == [s["response_token_ids"] for s in then]
    assert any(s["num_turns"] > 1 for s in now)


def test_benchmarks_with_the_tiny_model(evaluate: Command, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not BENCHMARKS.is_file():
        pytest.skip(f"{BENCHMARKS} is not here")
    rows = [json.loads(line) for line in BENCHMARKS.read_text(encoding="utf-8").splitlines()]
    few = [row for source in ("aime2024", "MATH-500") for row in [r for r in rows if r["source"] == source][:3]]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    Path("test.jsonl").write_text('{"question": "What is 2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}\n')
    monkeypatch.setenv("MATH_BENCHMARKS", "few.jsonl")
    monkeypatch.setenv("GSM8K_TEST", "test.jsonl")
    outcome = evaluate(
        *HF,
        f"ckpt={pretrained}",
        "validation=math",
        "response_length=4",
        "out=result",
        "validation.sources=[aime2024,MATH-500,gsm8k]",
    )
    assert outcome.code == 0, outcome.out + outcome.err
    figures = written(Path("result"))
    counts = {group: (f["num_prompts"], f["num_scored"], f["num_failed"]) for group, f in figures.items()}
    assert counts == {"aime2024": (3, 3, 0), "MATH-500": (3, 3, 0), "gsm8k": (1, 1, 0), "all": (7, 7, 0)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ckpt=nowhere/run/checkpoints",), "ckpt: no folder 'nowhere/run/checkpoints'"),
        (("ckpt=/tmp",), "or a folder in Hugging Face layout"),
        (("ckpt=cut",), "cut/model.safetensors: cannot be read as safetensors"),
        (("validation=null",), "validation: there is no such block"),
        (("validation=gsm8k",), "validation.data_args.file_name: data/gsm8k/test.jsonl cannot be read"),
        (("val_prompt_length=5000",), "val_sequence_length: prompts of 5000"),
        (("--multirun", "seed=1,2"), "--multirun: one evaluation at a time"),
        (("validation.sourcez=[a]",), "unknown key; did you mean 'sources'?"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    evaluate: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.delenv("GSM8K_TEST", raising=False)
    Path("cut").mkdir()
    Path("cut/config.json").write_text('{"model_type": "qwen3"}')
    Path("cut/model.safetensors").write_bytes(b"cut")
    outcome = evaluate(*HF, *arguments)
    assert outcome.code == 2 and expected in outcome.err, outcome.err
    assert not list(Path().glob("out/example_gspo/*"))


def test_dry_run_prints_the_plan_alone(evaluate: Command) -> None:
    outcome = evaluate(*HF, "validation.generating_args.num_return_sequences=4", "--dry-run")
    assert outcome.code == 0 and "avg@4, pass@4, maj@4; by source" in outcome.out and not Path("out").exists()


def test_rewards_that_all_fail_are_an_error_with_the_reason(evaluate: Command, pretrained: Path) -> None:
    arguments = (*SAMPLING[:-1], "rewards.column_addition.worker_cls=my_reward.raises", f"ckpt={pretrained}")
    outcome = evaluate(*HF, *arguments, "validation.data_args.num_rows=2", "out=result")
    assert outcome.code == 1 and "no reward could be computed" in outcome.err and "no opinion" in outcome.err


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
def test_vllm_gives_the_greedy_answers_of_transformers(evaluate: Command, pretrained: Path) -> None:
    greedy = (*SAMPLING[1:], "validation.generating_args.temperature=0", f"ckpt={pretrained}")
    for name, engine in (("hf", ("strategy=hf",)), ("vllm", ("actor_infer.strategy_args.strategy_name=vllm",))):
        outcome = evaluate("--config-name", "example_gspo", "output_dir=out", *engine, *greedy, f"out={name}")
        assert outcome.code == 0, outcome.out + outcome.err
    files = [read_samples(Path(name, "validation/step_000000.parquet")).samples for name in ("hf", "vllm")]
    ours, theirs = ([sample["response_token_ids"] for sample in samples] for samples in files)
    assert ours == theirs and written(Path("hf")) == written(Path("vllm"))
