"""Metrics of episodes against values by hand."""

from __future__ import annotations

from typing import Any

import pytest

from roll_gspo.batch import Completion
from roll_gspo.environments.pool import EnvironmentTime
from roll_gspo.episode import Episode, EpisodeBranch, EpisodeTurn
from roll_gspo.pipelines.rlvr.episode_metrics import environment_time_metrics, episode_metrics
from roll_gspo.tracking.names import metric_info


def played(end: str, mask: str, *turns: EpisodeTurn, failed: str | None = None, **changes: Any) -> Completion:
    """Return an episode; `mask` has `s` for each sampled token and `g` for each given one."""
    episode = Episode(
        prompt_ids=(1,),
        mask=tuple(letter == "s" for letter in mask),
        turn_ends=(),
        turns=turns,
        end=end,
        failed=failed,
        **changes,
    )
    return Completion((0,) * len(mask), (0.0,) * len(mask), "stop", episode=episode)


BRANCH = EpisodeBranch((1,), (2, 3), (-1.0, -1.0), (True, True), (2,), (EpisodeTurn("a"),))
COMPLETIONS = [
    played("done", "ssggs", EpisodeTurn("a", metrics={"calls": 2.0}), EpisodeTurn("b", metrics={"calls": 0.0})),
    played("max_turns", "sgsgs", EpisodeTurn("a"), EpisodeTurn("b", invalid=True), EpisodeTurn("c"), num_rewritten=2),
    played("done", "ss", EpisodeTurn("a", metrics={"calls": 4.0, "depth": 1.0}), branches=(BRANCH,)),
    played("failed", "sss", EpisodeTurn("a", invalid=True, metrics={"calls": 9.0}), failed="ValueError: no"),
]


def test_metrics_of_episodes() -> None:
    found = episode_metrics(COMPLETIONS, ["shop", "shop", "maze", "maze"])
    assert found == pytest.approx(
        {
            "episode/end_done": 2 / 4,
            "episode/end_max_turns": 1 / 4,
            "episode/end_max_tokens": 0.0,
            "episode/end_timeout": 0.0,
            "episode/end_failed": 1 / 4,
            "episode/turns_mean": 7 / 3,
            "episode/turns_max": 3.0,
            "episode/tokens_per_turn": 10 / 7,
            "episode/given_tokens_fraction": 4 / 14,
            "episode/invalid_turns": 1 / 7,
            "episode/rewritten": 2.0,
            "episode/branches_mean": 4 / 3,
            "env/shop/calls": 1.0,
            "env/maze/calls": 4.0,
            "env/maze/depth": 1.0,
        }
    )
    assert all(metric_info(name) for name in found)


def test_failed_episodes_have_no_turns() -> None:
    found = episode_metrics(COMPLETIONS[3:], ["maze"])
    assert found["episode/end_failed"] == 1.0 and {name.split("_")[0] for name in found} == {"episode/end"}


def test_responses_of_one_turn_have_no_metrics_of_episodes() -> None:
    assert episode_metrics([Completion((1,), (0.0,), "stop")], ["maths"]) == {}


def test_share_of_the_time_of_environments_that_generation_hid() -> None:
    found = environment_time_metrics(EnvironmentTime(12.0, 7.0), EnvironmentTime(4.0, 1.0))
    assert found == {"environment/seconds": 8.0, "environment/hidden_share": 0.75}
    assert environment_time_metrics(EnvironmentTime(4.0, 1.0), EnvironmentTime(4.0, 1.0)) == {
        "environment/seconds": 0.0,
        "environment/hidden_share": 1.0,
    }
