from __future__ import annotations

import base64
import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from browsed_run import record, write_samples, write_step
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.report.embedded import (
    MAX_CHARACTERS,
    MAX_SAMPLES,
    MAX_TOKENS,
    EmbeddedSamples,
    bisection_order,
    embed_samples,
)
from roll_gspo.report.run_folder import read_run


def groups_of(samples: EmbeddedSamples) -> list[dict[str, Any]]:
    """Return all groups that the page holds."""
    texts = [gzip.decompress(base64.b64decode(text)).decode() for _, text in samples.steps]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def embedded(folder: Path, **limits: int) -> EmbeddedSamples:
    return embed_samples(read_run(folder, 0).rollout_files, **limits)


@given(st.integers(0, 300))
def test_bisection_order_has_every_index_and_the_ends_first(count: int) -> None:
    order = list(bisection_order(count))
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][: min(count, 2)]


def test_sample_is_embedded_with_its_token_metrics(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [record(), record(score=0.0, group=1)], traced=[0])
    samples = embedded(tmp_path)
    assert (samples.num_samples, samples.num_read, samples.num_steps_left_out, samples.read_all) == (2, 2, 0, True)
    first, second = groups_of(samples)
    (sample,) = first["samples"]
    assert (first["id"], first["source"]) == ("row 7", "sums")
    assert (first["step"], first["prompt"], first["truth"], first["domain"]) == (1, record()["prompt"], "42", "maths")
    assert sample["tokens"] == ["4", "2", "<|end|>"] and sample["length"] == 3 and sample["sample"] == 0
    assert sample["logp"] == [-0.25, -0.5, -0.75] and sample["diff"] == 0.01 and sample["adv"] == 0.5
    assert sample["ratio"] == pytest.approx(math.exp(0.1), abs=1e-5)
    assert sample["components"] == {"correct": 1.5, "length": -0.5} and sample["answer"] == "42"
    assert "failure" not in sample and "ratio" not in second["samples"][0]


def test_staleness_of_a_sample_is_embedded_if_there_is_any(tmp_path: Path) -> None:
    runs = [{"version": 3, "tokens": 2}, {"version": 5, "tokens": 1}]
    one_run = [{"version": 3, "tokens": 3}]
    stale, fresh = record(version_runs=runs, staleness=2), record(version_runs=one_run, staleness=0, group=1)
    write_step(tmp_path, 1, [stale, fresh])
    first, second = (group["samples"][0] for group in groups_of(embedded(tmp_path)))
    assert (first["version"], first["newest"], first["staleness"]) == (3, 5, 2)
    assert second["version"] == 3 and not {"newest", "staleness"} & set(second)


def test_traced_then_failed_then_differing_groups_come_first(tmp_path: Path) -> None:
    scores = {0: (0.0, 0.0), 1: (0.0, 1.0), 2: (0.0, 0.0), 3: (1.0, 0.0)}
    records = [record(score=s, group=g, failed=g == 2, failure="hung") for g, pair in scores.items() for s in pair]
    write_step(tmp_path, 1, records, traced=[6, 7])
    assert [group["group"] for group in groups_of(embedded(tmp_path))] == [3, 2, 1, 0]
    only = embedded(tmp_path, max_bytes=1)
    assert [group["group"] for group in groups_of(only)] == [3] and (only.num_samples, only.num_read) == (2, 8)


def test_samples_stay_below_the_limit_and_every_step_is_embedded(tmp_path: Path) -> None:
    noise = random.Random(0)
    for step in range(1, 16):
        tokens = [[f" {noise.randrange(10**6)}" for _ in range(40)] for _ in range(16)]
        write_step(tmp_path, step, [record(tokens[i], group=i // 4) for i in range(16)])
    samples = embedded(tmp_path, max_bytes=24_000)
    assert sum(len(text) for _, text in samples.steps) < 48_000
    assert [step for step, _ in samples.steps] == list(range(1, 16))
    assert 15 * 4 <= samples.num_samples < samples.num_read
    few = embedded(tmp_path, max_bytes=4_000)
    assert {1, 15} < {step for step, _ in few.steps} and few.num_steps_left_out == 15 - len(few.steps) > 0


def test_long_responses_and_large_groups_are_truncated(tmp_path: Path) -> None:
    long = [record(["a"] * 20_000), record(["b" * 7000] * 4), record(["c"], response="c" * 100_000)]
    write_step(tmp_path, 1, [*long, *(record(score=i / 50, group=1) for i in range(50))])
    by_group = {group["group"]: group["samples"] for group in groups_of(embedded(tmp_path))}
    many, few, _ = by_group[0]
    assert len(many["tokens"]) == MAX_TOKENS and many["length"] == 20_000
    assert len(few["tokens"]) == 2 and sum(map(len, few["tokens"])) < MAX_CHARACTERS
    assert len(by_group[1]) == MAX_SAMPLES and {by_group[1][0]["score"], by_group[1][-1]["score"]} == {0.98, 0.0}


def test_samples_with_missing_values_are_embedded(tmp_path: Path) -> None:
    old = {"prompt": "p", "response": "r" * (MAX_CHARACTERS + 5), "score": 1.0, "failed": False, "group": 0}
    odd = {"prompt": None, "response": "", "score": math.inf, "group": 1, "response_tokens": []}
    numbers = {"old_log_probs": [-0.5], "advantages": [1.0, math.nan]}
    short = {"group": 2, "response": "ab", "response_tokens": ["a", "b"], **numbers}
    (tmp_path / "metrics.jsonl").touch()
    write_samples(tmp_path / "rollouts" / "step_000001.parquet", [old, odd, short])
    first, second, third = (group["samples"][0] for group in groups_of(embedded(tmp_path)))
    assert first["response"] == "r" * MAX_CHARACTERS and first["characters"] == MAX_CHARACTERS + 5
    assert second["response"] == "" and "score" not in second and "components" not in second
    assert third["tokens"] == ["a", "b"] and third["adv"] == [1.0, None] and "logp" not in third
