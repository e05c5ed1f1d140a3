"""Episodes as JSON."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.episode import Episode, EpisodeBranch, EpisodeTurn

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(), max_size=5)  # with lone surrogates, which models may write
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": VALUES}), max_size=2).map(tuple)
TURNS = st.builds(EpisodeTurn, TEXTS, MESSAGES, FINITE, st.booleans(), st.dictionaries(TEXTS, FINITE, max_size=2))


def tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=6).map(tuple)


IDS, MASKS, ENDS = tuples(st.integers(0, 2**31)), tuples(st.booleans()), tuples(st.integers(0, 99))
BRANCHES = st.builds(
    *(EpisodeBranch, IDS, IDS, tuples(FINITE), MASKS, ENDS, tuples(TURNS)),
    version_runs=tuples(st.tuples(st.integers(0, 9), st.integers(1, 9))),
)


@given(
    st.builds(
        Episode,
        prompt_ids=IDS,
        mask=MASKS,
        turn_ends=ENDS,
        turns=tuples(TURNS),
        end=TEXTS,
        failed=st.none() | TEXTS,
        traceback=TEXTS,
        num_rewritten=st.integers(0, 9),
        branches=tuples(BRANCHES),
    )
)
def test_episode_is_read_as_it_was_written(episode: Episode) -> None:
    text = episode.to_json()
    assert Episode.from_json(text) == episode
    assert text.isascii()


def test_mask_is_written_as_runs() -> None:
    episode = Episode(prompt_ids=(1,), mask=(False, True, True, False), turn_ends=(3,), turns=(), end="done")
    assert '"mask": [0, 1, 2, 1]' in episode.to_json()
    assert Episode.from_json(episode.to_json()).mask == episode.mask


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"turns": 1}', '{"turns": [{}]}', '{"prompt_ids": [], "mask": [""], "turns": []}']
)
def test_text_that_is_no_episode_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Episode.from_json(text)
