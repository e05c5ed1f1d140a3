"""Phases of shared devices, on recorded roles: the order of moves, what is refused, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from roll_gspo.errors import ResidencyError, WeightTransferError
from roll_gspo.roles.shared_devices import RESIDENCIES, Phase, Resident, ResidentRole, SharedDevices
from roll_gspo.strategies.residency import Residency

OFFLOADED, WEIGHTS, FULL = Residency
GENERATING, SCORING, TRAINING, SYNCING = Phase
ALL = {"actor_train": (0,), "actor_infer": (0,), "reference": (0,), "critic": (0,)}
GIB = 2**30


class Recorded(Resident):
    """A role that records its moves, and how much of a device of 16 GiB it takes."""

    sizes: ClassVar = {OFFLOADED: 0, WEIGHTS: 2, FULL: 10}

    def __init__(self, name: str, log: list[str], used: dict[str, int]) -> None:
        self._name, self._log, self._used = name, log, used
        self.fails_at: Residency | None = None

    def reside(self, residency: Residency) -> None:
        if residency == self.fails_at:
            self.fails_at = None
            raise ResidencyError("out of memory")
        self._log.append(f"{self._name} {residency.name}")
        self._used[self._name] = self.sizes[residency]
        assert sum(self._used.values()) <= 10 + 2, "memory was freed before it was needed"

    def device_memory(self) -> int | None:
        return sum(self._used.values()) * GIB


class Sync:
    """A weight sync that records the phase in which it sends."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.error: Exception | None = None

    def push(self, version: int) -> None:
        if self.error is not None:
            raise self.error
        self._log.append(f"send {version}")

    def restore(self, version: int) -> None:
        self._log.append(f"restore {version}")


class Case:
    """Shared devices with recorded roles."""

    def __init__(self, devices: Mapping[str, tuple[int, ...]] = ALL) -> None:
        self.log: list[str] = []
        self.used: dict[str, int] = {}
        self.roles = {name: Recorded(name, self.log, self.used) for name in devices}
        self.shared = SharedDevices(self.roles, devices)
        self.sync = Sync(self.log)
        self.shared.weights = self.sync

    def taken(self) -> list[str]:
        """Return what was recorded since the last call."""
        log, self.log[:] = list(self.log), []
        return log

    def entering(self, phase: Phase, *role: str) -> list[str]:
        self.shared.enter(phase, *role)
        return self.taken()


def test_a_step_moves_each_role_only_when_it_works() -> None:
    case = Case()
    case.shared.push(0)
    assert case.taken() == [], "an engine that is about to be offloaded needs no weights"
    assert case.entering(GENERATING) == [
        *("actor_train WEIGHTS", "actor_infer WEIGHTS", "send 0", "actor_train OFFLOADED", "actor_infer FULL")
    ]
    assert case.entering(SCORING, "reference") == ["actor_infer OFFLOADED", "reference WEIGHTS"]
    assert case.entering(SCORING, "critic") == ["reference OFFLOADED", "critic WEIGHTS"]
    assert case.entering(SCORING) == ["critic OFFLOADED", "actor_train WEIGHTS"]
    assert case.entering(TRAINING, "critic") == ["actor_train OFFLOADED", "critic FULL"]
    assert case.entering(TRAINING) == ["critic OFFLOADED", "actor_train FULL"]
    assert case.entering(TRAINING) == []
    case.shared.push(1)
    assert case.entering(SCORING) == ["actor_train WEIGHTS"], "the trace of an update"
    assert case.entering(GENERATING) == ["actor_infer WEIGHTS", "send 1", "actor_train OFFLOADED", "actor_infer FULL"]
    assert case.entering(GENERATING) == []
    assert case.shared.phase == (GENERATING, "actor_train")


def test_an_engine_that_left_gets_its_weights_again_without_an_update() -> None:
    case = Case()
    case.shared.push(3)
    case.entering(GENERATING)
    assert not case.shared.needs_weights
    case.entering(SCORING)
    assert case.shared.needs_weights, "vLLM frees the weights when it sleeps"
    assert case.entering(GENERATING)[1] == "send 3"


@pytest.mark.parametrize("between", [(TRAINING, "actor_train"), (TRAINING, "critic"), (SCORING, "reference")])
def test_validation_and_saving_may_come_between_steps(between: tuple[Phase, str]) -> None:
    case = Case()
    case.shared.push(0)
    for phase in (GENERATING, SCORING, TRAINING):
        case.entering(phase)
    case.shared.push(1)
    case.entering(GENERATING)  # validation
    case.entering(*between)  # a checkpoint
    assert case.entering(GENERATING)[-3:] == ["send 1", "actor_train OFFLOADED", "actor_infer FULL"]


def test_weights_are_due_before_generation() -> None:
    case = Case()
    with pytest.raises(WeightTransferError, match="call push first"):
        case.shared.enter(GENERATING)
    case.shared.push(0)
    case.sync.error = WeightTransferError("the engine is late")
    with pytest.raises(WeightTransferError, match="the engine is late"):
        case.shared.enter(GENERATING)
    assert case.shared.phase == (SYNCING, "actor_train") and case.shared.needs_weights
    case.taken()
    case.sync.error = None
    assert case.entering(GENERATING) == ["send 0", "actor_train OFFLOADED", "actor_infer FULL"]


@pytest.mark.parametrize(
    ("role", "fails_at", "phase", "repeated"),
    [
        ("actor_infer", OFFLOADED, TRAINING, ["actor_infer OFFLOADED", "actor_train FULL"]),
        ("actor_train", FULL, TRAINING, ["actor_train OFFLOADED", "actor_train FULL"]),
        ("reference", WEIGHTS, SCORING, ["reference OFFLOADED", "reference WEIGHTS"]),
    ],
)
def test_a_failed_transition_can_be_repeated(role: str, fails_at: Residency, phase: Phase, repeated: list[str]) -> None:
    case = Case()
    case.shared.push(0)
    case.entering(GENERATING)
    case.roles[role].fails_at = fails_at
    working = role if role != "actor_infer" else "actor_train"
    with pytest.raises(ResidencyError, match=rf"^{role}, before {phase}: out of memory"):
        case.shared.enter(phase, working)
    assert case.shared.phase is None
    case.taken()
    assert case.entering(phase, working) == repeated
    assert case.shared.phase == (phase, working)
    case.entering(GENERATING)
    assert {name: used for name, used in case.used.items() if used} == {"actor_infer": 10}


def test_a_role_with_its_own_devices_stays() -> None:
    case = Case({"actor_train": (0, 1), "reference": (0, 1)})  # the engines are elsewhere
    case.shared.push(0)
    assert case.taken() == ["actor_train WEIGHTS", "send 0"], "nothing is gained by waiting"
    assert not case.shared.needs_weights
    assert case.entering(GENERATING) == []
    assert case.entering(SCORING, "reference") == ["actor_train OFFLOADED", "reference WEIGHTS"]
    assert case.entering(SCORING, "critic") == []
    case.shared.restore(0)
    assert case.taken() == ["reference OFFLOADED", "actor_train WEIGHTS", "restore 0"]


def test_only_roles_on_the_same_devices_make_room() -> None:
    case = Case({"actor_train": (0, 1), "actor_infer": (0, 1, 2, 3), "reference": (2, 3)})
    case.shared.push(0)
    case.entering(GENERATING)
    assert case.entering(SCORING, "reference") == ["actor_infer OFFLOADED", "reference WEIGHTS"]
    assert case.entering(TRAINING) == ["actor_train FULL"], "the reference is on other devices"


def test_nothing_is_shared() -> None:
    devices = SharedDevices({}, {})
    for phase in Phase:
        devices.enter(phase)
    assert devices.take_metrics() == {} and not devices.needs_weights and devices.phase is None


def test_memory_is_measured_at_every_border() -> None:
    case = Case()
    case.shared.push(0)
    for phase, role in ((GENERATING, "actor_train"), (SCORING, "reference"), (TRAINING, "actor_train")):
        case.shared.enter(phase, role)
    case.used["actor_train"] = 14  # activations
    case.shared.enter(SCORING)
    assert case.shared.take_metrics() == {
        **{"memory/syncing_start_gib": 4.0, "memory/syncing_end_gib": 4.0},
        **{"memory/generating_start_gib": 10.0, "memory/generating_end_gib": 10.0},
        **{"memory/scoring_start_gib": 2.0, "memory/scoring_end_gib": 2.0},
        **{"memory/training_start_gib": 10.0, "memory/training_end_gib": 14.0},
    }
    assert case.shared.take_metrics() == {}


def test_every_phase_is_in_the_table() -> None:
    assert set(RESIDENCIES) == set(Phase)


def test_an_engine_without_residency_is_named() -> None:
    class Plain(ResidentRole):
        _strategy = object()

    with pytest.raises(ResidencyError, match=r"^object: is no OffloadableEngine, .* offload_states: false"):
        Plain().reside(OFFLOADED)
    assert Plain().device_memory() is None
