"""Episodes among the samples that a report holds."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from browsed_run import episode, message, record, turn, write_step

from roll_gspo.report.embedded import embed_samples
from roll_gspo.report.episodes import MAX_MESSAGE_CHARACTERS, MAX_TURNS
from roll_gspo.report.run_folder import read_run
from roll_gspo.rollout_files import Sample

SHORT = episode(
    [
        turn(["7", "+6"], message("tool", "13", '{"name": "sum"}'), reward=0.25, metrics={"calls": 1.0}),
        turn(["="], message("user", "?"), given=["<t>", "13"], invalid=True),
        turn(["=1", "3"], given=["?"], reward=1.0),
    ],
    version_runs=[{"version": 3, "tokens": 5}, {"version": 4, "tokens": 2}, {"version": 5, "tokens": 1}],
)


def embedded(folder: Path, *samples: Sample) -> list[dict[str, Any]]:
    """Return the samples of one step as the page holds them; each is a group."""
    write_step(folder, 1, [sample | {"group": i} for i, sample in enumerate(samples)])
    ((_, text),) = embed_samples(read_run(folder, 0).rollout_files).steps
    lines = gzip.decompress(base64.b64decode(text)).decode().splitlines()
    return [json.loads(line)["samples"][0] for line in sorted(lines, key=lambda line: json.loads(line)["group"])]


def test_turns_are_embedded(tmp_path: Path) -> None:
    found, plain = embedded(tmp_path, SHORT, record())
    assert found["turns"] == [
        {
            "given": 0,
            "tokens": 2,
            "reward": 0.25,
            "metrics": {"calls": 1.0},
            "messages": [{"role": "tool", "content": "13", "fields": '{"name": "sum"}'}],
            "versions": [3],
        },
        {
            "given": 2,
            "tokens": 1,
            "reward": 0.0,
            "invalid": True,
            "messages": [{"role": "user", "content": "?"}],
            "versions": [3],
        },
        {"given": 1, "tokens": 2, "reward": 1.0, "versions": [4, 5]},
    ]
    assert (found["end"], found["num_turns"], found["given"]) == ("done", 3, 3)
    assert not {"traceback", "rewritten", "failure"} & found.keys()
    assert not {"turns", "end", "num_turns", "given"} & plain.keys()


def test_values_of_given_tokens_are_unknown(tmp_path: Path) -> None:
    (found,) = embedded(tmp_path, SHORT)
    assert found["tokens"] == ["7", "+6", "<t>", "13", "=", "?", "=1", "3"]
    assert found["logp"] == [-0.25, -0.5, None, None, -0.75, None, -1.0, -1.25]
    assert found["adv"] == [0.5, 0.5, None, None, 0.5, None, 0.5, 0.5]
    assert found["diff"] == [0.01, 0.01, None, None, 0.01, None, 0.01, 0.01]


def test_failed_episode_keeps_its_cause(tmp_path: Path) -> None:
    failed = episode(
        [turn(["a"])], "failed", failed=True, failure="it burnt", traceback="line 1", score=None, num_rewritten=2
    )
    (found,) = embedded(tmp_path, failed)
    assert (found["end"], found["failure"], found["traceback"], found["rewritten"]) == (
        "failed",
        "it burnt",
        "line 1",
        2,
    )


def test_long_episodes_are_shortened(tmp_path: Path) -> None:
    (many, wide) = embedded(
        tmp_path,
        episode([turn(["a"], message("user", "b")) for _ in range(MAX_TURNS + 5)]),
        episode([turn(["a"], message("user", "b" * (MAX_MESSAGE_CHARACTERS + 7))), turn(["c"], message("user", "d"))]),
    )
    assert len(many["turns"]) == MAX_TURNS and many["num_turns"] == MAX_TURNS + 5
    first, second = (one["messages"][0]["content"] for one in wide["turns"])
    assert first == "b" * MAX_MESSAGE_CHARACTERS + "… (7 more characters)"
    assert second == "… (1 more characters)"


@pytest.mark.parametrize("changes", [{"turns": None}, {"response_mask": None}, {"version_runs": None}])
def test_incomplete_episodes_are_embedded(tmp_path: Path, changes: Sample) -> None:
    (found,) = embedded(tmp_path, SHORT | changes)
    assert found["tokens"] and ("turns" in found) is ("turns" not in changes)
