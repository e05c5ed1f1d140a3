"""Episodes in the files of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from roll_gspo.batch import Completion, Prompt, Rollouts, TrainBatch
from roll_gspo.episode import Episode, EpisodeTurn
from roll_gspo.pipelines.rlvr.sample_records import sample_batch, tracked_samples
from roll_gspo.rewards.base import RewardResult
from roll_gspo.rollout_files import EPISODE_SCHEMA, SCHEMA, Sample, read_samples
from roll_gspo.tracking.rollouts import RolloutWriter
from roll_gspo.tracking.token_texts import TokenTexts

TEXTS = TokenTexts(lambda ids: "".join(chr(96 + i) for i in ids))
FIRST = EpisodeTurn("ab\ud83d", ({"role": "tool", "content": "13", "name": "sum"},), 0.25, metrics={"calls": 2.0})
SECOND = EpisodeTurn("f", ({"role": "user", "content": [{"type": "text", "text": "é"}]},), 1.0, invalid=True)
# a and b were sampled, c to e given, f sampled, and g was given last.
PLAYED = Episode(
    prompt_ids=(1,),
    mask=(True, True, False, False, False, True, False),
    turn_ends=(2, 6),
    turns=(FIRST, SECOND),
    end="timeout",
    num_rewritten=1,
)
FAILED = Episode(
    prompt_ids=(1,), mask=(), turn_ends=(), turns=(), end="failed", failed="it burnt", traceback='File "env.py"'
)


def write(folder: Path, episodes: Sequence[Episode | None], with_text: Sequence[int]) -> list[Sample]:
    """Write one group of samples, each with the tokens 1 to 7 or those of its episode."""
    completions = []
    for episode in episodes:
        length = 7 if episode is None else len(episode.mask)
        given = (True,) * length if episode is None else episode.mask
        log_probs = tuple(-0.5 * (i + 1) if sampled else 0.0 for i, sampled in enumerate(given))
        completions.append(
            Completion(tuple(range(1, length + 1)), log_probs, "stop", None, ((3, 4), (4, length - 4)), episode)
        )
    rollouts = Rollouts.collate([Prompt((1,), "a", {})], [completions], 0, 4)
    values, mask = rollouts.rollout_log_probs, rollouts.sequences.response_mask
    trained = TrainBatch(rollouts.sequences, torch.arange(len(completions)), mask.float(), values, values)
    results = [RewardResult(0.0, e.failed if e else None) for e in episodes]
    batch = sample_batch(rollouts, ["shop"] * len(completions), results, TEXTS, with_text, trained)
    writer = RolloutWriter(folder / "rollouts")
    writer.write(1, [batch])
    writer.close()
    return read_samples(folder / "rollouts/step_000001.parquet").samples


def test_episode_has_its_turns_tokens_and_end(tmp_path: Path) -> None:
    played, failed, plain = write(tmp_path, [PLAYED, FAILED, None], [0, 1, 2])
    assert parquet.read_schema(tmp_path / "rollouts/step_000001.parquet").equals(EPISODE_SCHEMA)
    assert (played["end"], played["num_turns"], played["given_length"], played["num_rewritten"]) == ("timeout", 2, 4, 1)
    assert (played["response_length"], played["traceback"], played["num_branches"]) == (3, None, 1)
    first, second = played["turns"]
    assert first == {
        "answer": "ab\\ud83d",
        "messages": [{"role": "tool", "content": "13", "fields": '{"name": "sum"}'}],
        "reward": 0.25,
        "invalid": False,
        "metrics": {"calls": 2.0},
        "given_tokens": 0,
        "tokens": 2,
    }
    assert second["messages"] == [{"role": "user", "content": '[{"type": "text", "text": "é"}]', "fields": None}]
    assert (second["answer"], second["reward"], second["invalid"]) == ("f", 1.0, True)
    assert (second["given_tokens"], second["tokens"], second["metrics"]) == (3, 1, {})
    assert (failed["end"], failed["failure"], failed["traceback"]) == ("failed", "it burnt", 'File "env.py"')
    assert failed["turns"] == [] and failed["response_token_ids"] == []
    assert plain["turns"] is None and plain["end"] is None and plain["response"] == "abcdefg"


def test_values_of_sampled_tokens_are_aligned_by_the_mask(tmp_path: Path) -> None:
    (played,) = write(tmp_path, [PLAYED], [0])
    assert played["response_token_ids"] == [1, 2, 3, 4, 5, 6] and played["response"] == "abcdef"
    assert played["response_mask"] == [True, True, False, False, False, True]
    assert played["rollout_log_probs"] == played["old_log_probs"] == [-0.5, -1.0, -3.0]
    assert played["advantages"] == [1.0] * 3 and played["advantage"] == 1.0
    assert played["version_runs"] == [{"version": 3, "tokens": 4}, {"version": 4, "tokens": 3}]


def test_samples_without_texts_keep_the_numbers_of_their_turns(tmp_path: Path) -> None:
    _, without = write(tmp_path, [PLAYED, PLAYED], [0])
    assert [turn["answer"] for turn in without["turns"]] == [turn["messages"] for turn in without["turns"]]
    assert [(turn["reward"], turn["tokens"], turn["metrics"]) for turn in without["turns"]] == [
        (0.25, 2, {"calls": 2.0}),
        (1.0, 1, {}),
    ]
    assert without["response"] is None and without["end"] == "timeout"


def test_files_without_episodes_keep_their_columns(tmp_path: Path) -> None:
    write(tmp_path, [None, None], [0])
    assert parquet.read_schema(tmp_path / "rollouts/step_000001.parquet").equals(SCHEMA)


def test_trackers_get_the_mean_advantage_over_sampled_tokens() -> None:
    completion = Completion(tuple(range(1, 8)), (0.0,) * 7, "length", episode=PLAYED)
    rollouts = Rollouts.collate([Prompt((1,), "a", {})], [[completion]], 0, 4)
    advantages = rollouts.sequences.response_mask * 0.5
    (sample,) = tracked_samples(rollouts, ["shop"], [RewardResult(1.25)], advantages, TEXTS)
    assert sample.advantage == pytest.approx(0.5)
    assert (sample.num_tokens, sample.finish_reason) == (3, "timeout")
