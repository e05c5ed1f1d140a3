"""Grade-school mathematics from a file of {question, answer} rows, scored by math-verify."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of, rollouts_of

pytestmark = pytest.mark.e2e

SHARED = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
HF = ("--config-name", "example_gspo", "strategy=hf", "data=gsm8k", "max_steps=2", "run_name=run")
RUN = Path("out/example_gspo/run")


def _written(path: Path) -> Path:
    """Write rows in the published format: the working, then `#### answer`."""
    rows = [
        {
            "question": f"Ann has {a} apples and buys {b} bags of 1,000. How many are there?",
            "answer": f"{b} bags hold <<{b}*1000={b * 1000}>>{b * 1000}.\n#### {a + b * 1000:,}",
        }
        for a in range(2, 10)
        for b in range(1, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("source", ["written", "shared"])
def test_question_and_answer_file_trains(
    command: Callable[..., Outcome], small: tuple[str, ...], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "shared" and not SHARED.is_file():
        pytest.skip(f"{SHARED} is not here")
    file = SHARED if source == "shared" else _written(Path("train.jsonl").resolve())
    monkeypatch.setenv("GSM8K_TRAIN", str(file))
    arguments = [a for a in small if not a.startswith(("rewards.", "validation."))]
    outcome = command(*HF, *arguments, "max_steps=2", "actor_train.data_args.num_rows=64")
    assert outcome.code == 0, outcome.err
    assert (RUN / "report.html").stat().st_size > 10_000
    rows = metrics_of(RUN)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["reward/failed"] == 0 for row in rows)
    samples = rollouts_of(RUN)[1]
    assert {s["domain"] for s in samples} == {"gsm8k"}
    assert all("," not in s["ground_truth"] and float(s["ground_truth"]) > 0 for s in samples)
    assert all(s["prompt"].startswith("<|user|>") and s["prompt"].endswith("<|assistant|>") for s in samples)


def test_math_rule_scores_the_answers_of_the_policy(command: Callable[..., Outcome], small: tuple[str, ...]) -> None:
    """The warm-started policy ends its responses with digits, and the last number counts."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b), "domain": "gsm8k"} for a in range(10, 30) for b in (11, 12)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [a for a in small if not a.startswith(("rewards.", "validation."))]
    outcome = command(*HF, *arguments, "max_steps=1", "actor_train.data_args.file_name=sums.jsonl")
    assert outcome.code == 0, outcome.err
    (samples,) = rollouts_of(RUN).values()
    for sample in samples:
        said_it = sample["ground_truth"] in sample["response"]
        assert sample["score"] in (0.0, 1.0)
        assert said_it or sample["score"] == 0.0


def test_domains_keep_their_shares_and_order_after_a_resume(
    command: Callable[..., Outcome], small: tuple[str, ...]
) -> None:
    for name, count in (("sums", 7), ("words", 40)):
        rows = [{"prompt": f"{name}{i}", "ground_truth": "1"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "{file_name: [sums.jsonl, words.jsonl], file_domains: {sums.jsonl: column_addition, words.jsonl: words}"
    arguments = [a for a in small if not a.startswith(("max_steps=", "save_steps=", "validation."))]
    arguments += ["--config-name", "example_gspo", "strategy=hf", "validation=null", "save_steps=2", "trace_groups=0"]
    arguments += ["+rewards.words.worker_cls=my_reward.digits"]
    arguments += [f"actor_train.data_args={data}, domain_interleave_probs: {{column_addition: 0.75, words: 0.25}}}}"]
    assert command(*arguments, "run_name=whole", "max_steps=4").code == 0
    whole, resumed = Path("out/example_gspo/whole"), Path("out/example_gspo/resumed")
    drawn = {}
    for step, samples in rollouts_of(whole).items():
        assert sorted(Counter(s["prompt"].count("sums") for s in samples).items()) == [(0, 8), (1, 24)]
        drawn[step] = [s["prompt"] for s in samples]
    assert metrics_of(whole)[-1]["domain/column_addition/epoch"] == 3, "24 of 7 rows"
    shares = "actor_train.data_args.domain_interleave_probs.words"
    from_step_2 = f"resume_from_checkpoint={whole}/checkpoints/step_000002"
    assert command(*arguments, "run_name=resumed", "max_steps=4", from_step_2).code == 0
    for step, samples in rollouts_of(resumed).items():
        assert [s["prompt"] for s in samples] == drawn[step]
    assert len(rollouts_of(resumed)) == 2
    outcome = command(
        *arguments, "run_name=other", "max_steps=4", from_step_2, f"{shares}=0.2501", "resume_with_changes=true"
    )
    assert outcome.code == 1
    assert all(text in outcome.err for text in ("domain_interleave_probs", "words: 0.2501", "words: 0.25;"))
