"""Rules of the keys of asynchronous generation."""

import pytest

from tests.config_problems import problem_of


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (("async_mode=in_flight",), "async_mode", ("async_generation_ratio",)),
        (("async_generation_ratio=1", "partial_rollouts=drop"), "partial_rollouts", ("in_flight",)),
        (
            ("async_generation_ratio=1", "async_mode=in_flight"),
            "async_mode",
            ("execution: ray", "async_mode: one_step_off"),
        ),
        (
            (
                *("async_generation_ratio=2", "async_mode=in_flight", "execution=ray", "model=tiny_qwen3_moe"),
                "router_replay=R3",
            ),
            "partial_rollouts",
            ("restart",),
        ),
        (("async_generation_ratio=-1",), "async_generation_ratio", ("0",)),
    ],
)
def test_combination_that_cannot_be_honoured_is_refused(
    overrides: tuple[str, ...], key: str, words: tuple[str, ...]
) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key
    assert all(word in problem.message for word in words)
