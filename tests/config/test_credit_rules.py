"""Rules of the credit of turns."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import problem_of

PAPER = ("algorithm=gspo_paper",)  # importance_sampling: seq, adv_estimator: grpo
TURN = (*PAPER, "importance_sampling=seq_token", "credit=turn")


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        ((*PAPER, "step_reward_weight=2"), "step_reward_weight", ("credit", "turn")),
        ((*PAPER, "turn_baseline=state"), "turn_baseline", ("credit", "turn")),
        ((*PAPER, "credit=turn"), "credit", ("seq", "seq_token", "segment", "token")),
        ((*PAPER, "credit=turn", "importance_sampling=token", "policy_loss=fspo"), "credit", ("fspo", "policy_loss")),
        ((*TURN, "adv_estimator=raft_plus_plus"), "credit", ("raft_plus_plus", "grpo", "gae", "dr_grpo")),
        ((*TURN, "adv_estimator=maxrl"), "credit", ("maxrl", "grpo", "credit: episode")),
        ((*TURN, "adv_estimator=rloo", "turn_baseline=group"), "turn_baseline", ("group", "rloo", "dr_grpo")),
        ((*TURN, "adv_estimator=reinforce", "turn_baseline=state"), "turn_baseline", ("state", "reinforce", "grpo")),
        ((*TURN, "kl=token_level"), "add_token_level_kl", ("use_kl_loss", "credit: episode")),
        ((*TURN, "step_reward_weight=0"), "step_reward_weight", ("0", "episode_reward_weight")),
        (
            (*TURN, "reward_norm=running", "adv_estimator=reinforce", "episode_reward_weight=1"),
            "episode_reward_weight",
            ("1", "running", "batch"),
        ),
        ((*TURN, "adv_estimator=gae", "step_reward_gamma=0.9"), "step_reward_gamma", ("gae", "gamma")),
        ((*TURN, "adv_estimator=gae", "reward_norm=batch"), "reward_norm", ("batch", "none")),
    ],
)
def test_turns_without_an_advantage_are_refused(
    overrides: tuple[str, ...], key: str, values: tuple[object, ...]
) -> None:
    problem = problem_of(*overrides, name="example_agentic_gspo")
    assert problem.key == key
    for value in values:
        assert str(value) in problem.message


@pytest.mark.parametrize(
    "overrides",
    [
        TURN,
        (*TURN, "episode_reward_weight=1", "turn_baseline=state", "step_reward_gamma=0.95"),
        (*TURN, "adv_estimator=rloo"),
        (*TURN, "adv_estimator=gae"),
        (*PAPER, "importance_sampling=segment", "credit=turn"),
        (*PAPER, "policy_loss=cispo", "credit=turn"),
        (*PAPER, "step_reward_gamma=0.9"),
    ],
)
def test_combinations_that_train_turns_are_accepted(overrides: tuple[str, ...]) -> None:
    load_config("example_agentic_gspo", *overrides)


@pytest.mark.parametrize(
    ("overrides", "key"), [(TURN, "credit"), ((*PAPER, "step_reward_gamma=0.5"), "step_reward_gamma")]
)
def test_responses_of_one_turn_have_no_credit(overrides: tuple[str, ...], key: str) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key and problem.names("train_env_manager")
