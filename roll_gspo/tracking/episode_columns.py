"""Convert episodes to columns of a file of samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from roll_gspo.episode import Episode, EpisodeTurn
from roll_gspo.rollout_files import EPISODE_FIELDS, valid_texts


def episode_columns(episodes: Sequence[Episode | None]) -> dict[str, list[Any]]:
    """Return the columns of `EPISODE_FIELDS` without texts and masks; a row of None is null."""
    return {
        "end": [None if one is None else one.end for one in episodes],
        "traceback": [None if one is None else one.traceback or None for one in episodes],
        "num_turns": [None if one is None else len(one.turns) for one in episodes],
        "given_length": [None if one is None else len(one.mask) - sum(one.mask) for one in episodes],
        "num_rewritten": [None if one is None else one.num_rewritten for one in episodes],
        "num_branches": [None if one is None else one.num_branches for one in episodes],
        "turns": [None if one is None else list(_turns(one)) for one in episodes],
    }


def turns_column(episodes: Sequence[Episode | None]) -> pa.Array:
    """Return the column `turns` with the texts of answers and messages."""
    values = [
        None if one is None else [entry | _texts(turn) for entry, turn in zip(_turns(one), one.turns, strict=True)]
        for one in episodes
    ]
    return pa.array(values, EPISODE_FIELDS["turns"])


def _turns(episode: Episode) -> Iterator[dict[str, Any]]:
    """Yield the numbers of each turn. `given_tokens` lie before the answer, whose `tokens` were sampled."""
    start = 0
    for turn, end in zip(episode.turns, episode.turn_ends, strict=True):
        num_sampled = sum(episode.mask[start:end])
        yield {
            "reward": turn.reward,
            "invalid": turn.invalid,
            "metrics": [{"name": _valid(name), "value": value} for name, value in turn.metrics.items()],
            "given_tokens": end - start - num_sampled,
            "tokens": num_sampled,
        }
        start = end


def _texts(turn: EpisodeTurn) -> dict[str, Any]:
    return {"answer": _valid(turn.answer), "messages": [_message(message) for message in turn.messages]}


def _message(message: Mapping[str, Any]) -> dict[str, str | None]:
    """Return role and content; `fields` are the other keys as JSON. A content that is no text is JSON, too."""
    content = message.get("content") or ""
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {
        "role": _valid(str(message.get("role"))),
        "content": _valid(content) if isinstance(content, str) else _json(content),
        "fields": _json(others) if others else None,
    }


def _json(value: object) -> str:
    return _valid(json.dumps(value, ensure_ascii=False, default=str))


def _valid(text: str) -> str:
    return str(next(valid_texts([text])))
