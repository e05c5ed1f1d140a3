"""Mistakes in environments: one line names each, and no traceback.

tests/config/test_episode_rules.py has blocks that contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome

Command = Callable[..., Outcome]
AGENTIC = ("--config-name", "example_agentic_gspo", "strategy=hf")
BLOCK = "custom_envs.adding_machine"
DRY = "--dry-run"

ENVIRONMENTS = '''
from roll_gspo.environments import Environment, Reply, Start

value = 3


class Plain:
    pass


class Half(Environment):
    def reset(self, row, seed):
        return Start(({"role": "user", "content": "?"},))


class Closed(Environment):
    """Fails to begin an episode."""

    def reset(self, row, seed):
        raise OSError("the service is down")

    def step(self, answer):
        return Reply(done=True)


class Breaks(Environment):
    """Fails in the second turn."""

    turns = 0

    def reset(self, row, seed):
        return Start(({"role": "user", "content": f"{seed}?"},))

    def step(self, answer):
        self.turns += 1
        if self.turns == 2:
            raise ZeroDivisionError("no such level")
        return Reply(({"role": "user", "content": "?"},))
'''

MISTAKES: list[tuple[tuple[str, ...], str]] = [
    # classes
    (
        (f"{BLOCK}.env_type=adding_machin",),
        f"{BLOCK}.env_type: unknown name 'adding_machin'; did you mean 'adding_machine'?",
    ),
    (
        (f"{BLOCK}.env_type=no_such_module.Game",),
        f"{BLOCK}: environment no_such_module.Game: no module 'no_such_module'",
    ),
    ((f"{BLOCK}.env_type=my_environments.Gone",), "module 'my_environments' has no 'Gone'"),
    ((f"{BLOCK}.env_type=my_environments.Plain",), "is no subclass of roll_gspo.environments.Environment"),
    ((f"{BLOCK}.env_type=my_environments.value",), "is no subclass of roll_gspo.environments.Environment"),
    ((f"{BLOCK}.env_type=my_environments.Half",), "the class lacks step; define these methods"),
    ((f"{BLOCK}.env_config.max_invald=1",), "got an unexpected keyword argument 'max_invald'"),
    ((f"{BLOCK}.max_step=3",), f"{BLOCK}.max_step: unknown key; did you mean 'max_steps'?"),
    ((f"{BLOCK}.max_steps=0",), f"{BLOCK}.max_steps: "),
    # blocks
    (("custom_envs=null",), "custom_envs: "),
    (("~custom_envs",), "train_env_manager: there is no environment; add custom_envs"),
    (
        ("train_env_manager=null", "rewards={a: {worker_cls: math_rule}}"),
        "custom_envs: is used only with",
    ),
    (
        ("train_env_manager.num_groups_partition=[3]", "train_env_manager.num_env_groups=4"),
        "train_env_manager.num_groups_partition: the sum is 3, not num_env_groups 4",
    ),
    (("train_env_manager.group_sizes=4",), "did you mean 'group_size'?"),
    (("val_env_manager={tags: [x]}",), "val_env_manager.tags: x is no block of custom_envs"),
]
TINY = (
    *("max_steps=2", "save_steps=100", "eval_steps=100", "rollout_batch_size=2", "num_return_sequences_in_group=2"),
    *("response_length=32", "actor_train.training_args.per_device_train_batch_size=4"),
    *("actor_train.training_args.gradient_accumulation_steps=1", "warm_start=null", "output_dir=out", "run_name=run"),
)


@pytest.fixture
def mistaken(command: Command, workplace: Path) -> Command:
    """The command in a folder with a module of environments."""
    (workplace / "my_environments.py").write_text(ENVIRONMENTS)
    return command


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(a)[:60] for a, _ in MISTAKES])
def test_mistake_is_named_in_one_line(mistaken: Command, arguments: tuple[str, ...], expected: str) -> None:
    outcome = mistaken(*AGENTIC, *arguments, DRY)
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    first, *problems = outcome.err.splitlines()
    assert first.startswith("roll_gspo: ") and " problem" in first
    assert any(expected in problem for problem in problems), outcome.err
    assert len(problems) == int(first.split()[1]) == len(set(problems)), "each problem is one line and is told once"


def test_environment_that_does_not_begin_stops_the_run_before_training(mistaken: Command) -> None:
    outcome = mistaken(*AGENTIC, *TINY, f"{BLOCK}.env_type=my_environments.Closed")
    assert outcome.code == 2, outcome.out + outcome.err
    assert f"{BLOCK}: reset failed on row " in outcome.err and "OSError: the service is down" in outcome.err
    assert "Traceback" not in outcome.err


def test_environment_that_always_fails_stops_the_run_with_the_cause(mistaken: Command) -> None:
    outcome = mistaken(*AGENTIC, *TINY, f"{BLOCK}.env_type=my_environments.Breaks")
    assert outcome.code == 1, outcome.out + outcome.err
    assert "ZeroDivisionError: no such level" in outcome.err and "max_failed_fraction" in outcome.err
    assert "Traceback" not in outcome.err
