"""Checks of episodes whose tokens a `CountingEngine` of letters sampled, and whose environment repeats every answer."""

from __future__ import annotations

from pathlib import Path

from counting_engine import letter, token

from roll_gspo.batch import Completion
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.models.tiny import ASSISTANT, END, USER, byte_tokenizer
from roll_gspo.roles.episodes import turn_seed

NUM_TURNS = 3
REWARD = sum(range(1, NUM_TURNS + 1))  # that of `Echo` for every episode
ECHO = EnvironmentSpec("played_environments.Echo")
ENVIRONMENTS = Path(__file__).parent / "environments"
TOKENIZER = byte_tokenizer()


def assert_exact(completion: Completion, seed: int) -> None:
    """Check every token of an episode, its log-prob and the version of the weights that sampled it."""
    episode, tokens = completion.episode, completion.token_ids
    assert episode is not None
    assert (episode.failed, episode.end, len(episode.turns)) == (None, "max_turns", NUM_TURNS)
    assert episode.reward == REWARD
    versions = [version for version, count in completion.version_runs for _ in range(count)]
    assert len(versions) == len(tokens) == len(completion.log_probs) == len(episode.mask)
    assert versions == sorted(versions)
    end = 0
    for number, (turn, turn_end) in enumerate(zip(episode.turns, episode.turn_ends, strict=True)):
        start = episode.mask.index(True, end)
        given = f"{END}{USER}{episode.turns[number - 1].answer}{ASSISTANT}" if number else ""
        assert TOKENIZER.decode(tokens[end:start]) == given
        assert not any(episode.mask[end:start]) and all(episode.mask[start:turn_end])
        assert completion.log_probs[end:start] == (0.0,) * (start - end)
        prompt, own_seed = (*episode.prompt_ids, *tokens[:start]), turn_seed(seed, number)
        expected = [letter(token(prompt, own_seed, position)) for position in range(turn_end - start)]
        assert list(tokens[start:turn_end]) == expected and turn.answer == TOKENIZER.decode(expected)
        assert completion.log_probs[start:turn_end] == tuple(-float(version) for version in versions[start:turn_end])
        end = turn_end
    assert end == len(tokens)
