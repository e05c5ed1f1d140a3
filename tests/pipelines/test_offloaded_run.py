"""Training with roles that take turns on one device, which here is the CPU: the numbers are those without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, checkpoints_of, computed, metrics_of, rollouts_of
from safetensors.torch import load_file

from roll_gspo.checkpoint import HF_EXPORT
from roll_gspo.roles.shared_devices import SharedDevices

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
PPO = ("algorithm=ppo", "kl=loss")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the phases that a run enters."""
    log: list[str] = []
    enter = SharedDevices.enter

    def recorded(self: SharedDevices, phase: Any, role: str = "actor_train") -> None:
        before = self.phase
        enter(self, phase, role)
        if self.phase != before:
            log.append(phase.value if role == "actor_train" else f"{phase.value} {role}")

    monkeypatch.setattr(SharedDevices, "enter", recorded)
    return log


def _final_weights(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints" / checkpoints_of(run)[-1] / HF_EXPORT / "model.safetensors")


def test_a_run_whose_roles_take_turns_gives_the_same_numbers(
    command: Command, small: tuple[str, ...], entered: list[str]
) -> None:
    outcomes = [
        command(*HF, *PPO, *small, f"offload_states={value}", f"run_name=turns_{value}") for value in ("false", "true")
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
    stays, moves = (Path(f"out/example_gspo/turns_{value}") for value in ("false", "true"))
    assert computed(moves) == computed(stays) and len(metrics_of(moves)) == 5
    assert rollouts_of(moves) == rollouts_of(stays)
    for name, weight in _final_weights(stays).items():
        assert weight.equal(_final_weights(moves)[name]), name
    step = [
        *("generating", "scoring reference", "scoring critic", "scoring", "training critic", "training"),
        *("scoring", "syncing"),  # the trace of the update, new weights
    ]
    assert entered[:11] == ["syncing", *step, "generating", "scoring reference"], "the first step follows a validation"
    assert entered.count("syncing") == 6, "before validations 0, 2 and 4, and steps 2, 3 (after a save) and 4"
    # A run that resumes moves the loaded state to the host before it generates.
    resumed = command(
        *HF,
        *PPO,
        *small,
        "offload_states=false",
        "run_name=again",
        f"resume_from_checkpoint={moves}/checkpoints/step_000002",
    )
    assert resumed.code == 0, resumed.err
    assert computed(Path("out/example_gspo/again")) == computed(stays)[3:]
    entered.clear()
    turns = command(
        *HF,
        *PPO,
        *small,
        "offload_states=true",
        "run_name=turns",
        f"resume_from_checkpoint={stays}/checkpoints/step_000002",
    )
    assert turns.code == 0, turns.err
    assert computed(Path("out/example_gspo/turns")) == computed(stays)[3:]
    assert entered[:4] == ["training", "training critic", "syncing", "generating"]


def test_a_skipped_update_needs_no_new_version(command: Command, small: tuple[str, ...], entered: list[str]) -> None:
    arguments = ("max_steps=2", "rewards.column_addition.worker_cls=my_reward.half", "kl=none")
    for value in ("false", "true"):
        assert command(*HF, *small, *arguments, f"offload_states={value}", f"run_name=turns_{value}").code == 0
    stays, moves = (Path(f"out/example_gspo/turns_{value}") for value in ("false", "true"))
    assert computed(moves) == computed(stays)
    assert all(row["actor/num_updates"] == 0 for row in metrics_of(moves)[1:])
    assert entered[:5] == ["syncing", "generating", "scoring", "syncing", "generating"], "sleeping lost the weights"
