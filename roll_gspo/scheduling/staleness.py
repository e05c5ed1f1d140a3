"""Accounting of groups under bounded staleness.

The version of the weights is the number of completed training steps. A group started at version w and trained in the
step that leads to version v + 1 has staleness v - w. The scheduler decides how many groups may start and which groups
form the next batch, so that no trained group exceeds the maximum staleness.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.errors import CheckpointError


@dataclass
class _Group:
    """A started group that is not trained yet; `version` is that of the weights at its start."""

    version: int
    deadline: int
    is_finished: bool = False


class StalenessScheduler:
    """Choose groups such that none is trained with a staleness above `max_staleness`.

    A group started at version w has the deadline w + n: it belongs to the batch of version w + n or earlier. At most
    (n + 1) * G groups are started and untrained, which is the number that the batches of these versions hold.

    Without `in_order`, a batch consists of the finished groups with the earliest deadlines. It is withheld while the
    groups left behind could miss their deadlines. With G = `groups_per_step`, these are the versions d for which more
    than (d - version) * G groups with a deadline of at most d would be left.

    With `in_order`, the batch of version v consists of the groups v * G to (v + 1) * G - 1, and all of them start at
    version max(0, v - n). Weights change only while no group is in flight.

    Every operation takes logarithmic time, except that `batch` is linear in the finished groups if it returns a batch.

    Args:
        groups_per_step: groups per training step, G.
        max_staleness: n, the maximum difference between the version that trains and the version that samples.
        in_order: batches consist of groups in the order of their numbers.
        num_steps: training steps of the whole run. No group starts that could only be trained later. None: no limit.
    """

    def __init__(self, groups_per_step: int, max_staleness: int, in_order: bool, num_steps: int | None = None) -> None:
        if groups_per_step < 1 or max_staleness < 0:
            raise ValueError(f"groups_per_step {groups_per_step} must be >= 1, max_staleness {max_staleness} >= 0")
        self._size, self._bound, self._in_order, self._num_steps = groups_per_step, max_staleness, in_order, num_steps
        self._version = 0
        self._next = 0
        self._reused: list[int] = []  # heap of dropped numbers; used in order only
        self._groups: dict[int, _Group] = {}
        self._untrained: Counter[int] = Counter()  # per deadline
        self._finished: dict[int, set[int]] = {}  # groups per deadline
        self._num_finished = 0

    @property
    def version(self) -> int:
        """Number of completed training steps."""
        return self._version

    @property
    def num_unfinished(self) -> int:
        """Number of groups in flight."""
        return len(self._groups) - self._num_finished

    @property
    def unfinished(self) -> list[int]:
        """Groups in flight, in ascending order."""
        return sorted(number for number, group in self._groups.items() if not group.is_finished)

    @property
    def finished(self) -> list[int]:
        """Finished groups that are not trained yet, in ascending order."""
        return sorted(number for number, group in self._groups.items() if group.is_finished)

    def deadline(self, group: int) -> int:
        """Return the last version whose batch may contain the group."""
        return self._groups[group].deadline

    def started_at(self, group: int) -> int:
        """Return the version at which the group was started or restarted last."""
        return self._groups[group].version

    def num_startable(self) -> int:
        """Return the number of groups that may start now."""
        num_batches = self._bound + 1
        if self._num_steps is not None:
            num_batches = min(num_batches, self._num_steps - self._version)
        return max(0, num_batches * self._size - len(self._groups))

    def start(self) -> int:
        """Start a group and return its number.

        In order, the number is the lowest one without a started group. Otherwise it is a new number.
        """
        if self.num_startable() < 1:
            raise ValueError(f"{len(self._groups)} groups are untrained; train a batch or drop a group first")
        if self._reused:
            number = heapq.heappop(self._reused)
        else:
            number, self._next = self._next, self._next + 1
        self._add(number, self._version)
        return number

    def finish(self, group: int) -> None:
        """Mark a started group as finished: its responses are scored, and it can be trained."""
        entry = self._groups[group]
        if entry.is_finished:
            raise ValueError(f"group {group} is finished already")
        entry.is_finished = True
        self._finished.setdefault(entry.deadline, set()).add(group)
        self._num_finished += 1

    def drop(self, group: int) -> None:
        """Remove a group, finished or not. Its slot is free. In order, `start` returns its number again."""
        self._check_replaceable(group)
        self._remove(group)
        if self._in_order:
            heapq.heappush(self._reused, group)

    def restart(self, group: int) -> None:
        """Discard the responses of a group, finished or not. It starts again at the current version."""
        self._check_replaceable(group)
        self._remove(group)
        self._add(group, self._version)

    def batch(self) -> list[int] | None:
        """Return the groups of the next batch in the order of their deadlines and numbers, or None if it must wait.

        Once every startable group was started and every started group is finished, the result is not None.
        """
        if self._num_finished < self._size:
            return None
        now = self._version
        if self._in_order:
            return sorted(self._finished[now]) if len(self._finished.get(now, ())) == self._size else None
        taken: dict[int, int] = {}
        free = self._size
        for deadline in self._deadlines():
            taken[deadline] = min(free, len(self._finished.get(deadline, ())))
            free -= taken[deadline]
        if self._missed(taken) is not None:
            return None
        chosen = (heapq.nsmallest(count, self._finished.get(deadline, ())) for deadline, count in taken.items())
        return [group for groups in chosen for group in groups]

    def train(self, groups: Sequence[int]) -> None:
        """Complete the training step of a batch: free its slots and increase the version.

        Call it after the new weights reached the engines, because later groups count from the new version.
        """
        chosen = [self._groups[group] for group in set(groups)]
        if len(groups) != self._size or len(chosen) != self._size or not all(g.is_finished for g in chosen):
            raise ValueError(f"a batch needs {self._size} different finished groups, not {list(groups)}")
        if self._in_order and (not self.can_update() or any(g.deadline != self._version for g in chosen)):
            raise ValueError(f"groups {list(groups)} are not the batch of version {self._version}, or groups in flight")
        missed = self._missed(Counter(group.deadline for group in chosen))
        if missed is not None:
            raise ValueError(f"too many groups left behind must be trained by version {missed}; train `batch()`")
        for group in groups:
            self._remove(group)
        self._version += 1

    def can_update(self) -> bool:
        """Return whether the weights may change now. In order, every startable group must be finished first."""
        return not self._in_order or (self._num_finished == len(self._groups) and self.num_startable() == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "groups_per_step": self._size,
            "in_order": self._in_order,
            "version": self._version,
            "next_group": self._next,
            "reused": sorted(self._reused),
            "groups": [[number, group.version, group.is_finished] for number, group in sorted(self._groups.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state. The maximum staleness may differ as long as every group can meet its deadline.

        Raises:
            CheckpointError: the state does not fit the settings.
        """
        for key, value in (("groups_per_step", self._size), ("in_order", self._in_order)):
            if state[key] != value:
                raise CheckpointError(f"{key}: is {value}, but {state[key]} in the checkpoint; set it to {state[key]}")
        loaded = StalenessScheduler(self._size, self._bound, self._in_order, self._num_steps)
        loaded._version, loaded._next, loaded._reused = state["version"], state["next_group"], list(state["reused"])
        for number, version, is_finished in state["groups"]:
            loaded._add(number, version)
            if is_finished:
                loaded.finish(number)
        if len(loaded._groups) > (self._bound + 1) * self._size or loaded._is_late():
            raise CheckpointError(
                f"max_staleness: {self._bound} is too small for the {len(loaded._groups)} untrained groups of the "
                "checkpoint; resume with the earlier value"
            )
        self.__dict__.update(loaded.__dict__)

    def _deadlines(self) -> range:
        return range(self._version, self._version + self._bound + 1)

    def _missed(self, taken: Mapping[int, int]) -> int | None:
        """Return the first deadline that groups left behind can miss if a batch has these numbers of groups."""
        left = 0
        for deadline in self._deadlines():
            left += self._untrained[deadline] - taken.get(deadline, 0)
            if left > (deadline - self._version) * self._size:
                return deadline
        return None

    def _is_late(self) -> bool:
        """Return whether some groups cannot meet their deadlines, whatever is trained."""
        if any(group.deadline < self._version for group in self._groups.values()):
            return True
        due = 0
        for deadline in self._deadlines():
            due += self._untrained[deadline]
            if due > (deadline - self._version + 1) * self._size:
                return True
        return False

    def _add(self, number: int, version: int) -> None:
        deadline = number // self._size if self._in_order else version + self._bound
        self._groups[number] = _Group(version, deadline)
        self._untrained[deadline] += 1

    def _remove(self, number: int) -> None:
        group = self._groups.pop(number)
        self._untrained[group.deadline] -= 1
        if not self._untrained[group.deadline]:
            del self._untrained[group.deadline]
        if group.is_finished:
            self._num_finished -= 1
            self._finished[group.deadline].discard(number)
            if not self._finished[group.deadline]:
                del self._finished[group.deadline]

    def _check_replaceable(self, number: int) -> None:
        """Check that responses of the group can still be sampled with the version that its order requires."""
        if self._in_order and self._groups[number].version != self._version:
            raise ValueError(
                f"group {number} was started at version {self._groups[number].version} and must not be sampled again "
                f"at version {self._version}"
            )
