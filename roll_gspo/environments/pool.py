"""A pool of worker processes that play episodes of one environment."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from roll_gspo.environments.base import Reply, Start
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.environments.worker import Command, Setup
from roll_gspo.errors import ConfigError, PlayError
from roll_gspo.workers.output import WorkerOutput
from roll_gspo.workers.process import ChildProcess, WorkerProgram, WorkerStartError, kill_marked

logger = logging.getLogger(__name__)
_MAX_WAIT_S = 60.0
_PROBE, _PROBE_SLICE_S = -1, 0.25  # key of the episode that `check` begins
_MAX_CONSECUTIVE_FAILED_STARTS = 3


class Failure(NamedTuple):
    """An episode that cannot go on.

    Attributes:
        reason: exception, timeout or lost process.
        traceback: the frames of the environment in which it raised; empty if it did not raise.
    """

    reason: str
    traceback: str = ""


class EnvironmentTime(NamedTuple):
    """Seconds that environments took for their turns, summed over episodes.

    Attributes:
        total_s: all of them.
        hidden_s: those in which the engines sampled answers of other episodes.
    """

    total_s: float
    hidden_s: float


@dataclass(frozen=True)
class Played:
    """Result of a command.

    Attributes:
        episode: number of the episode.
        turn: its turn; 0 for the start.
        result: what the environment returned.
        seconds: time that the environment took.
    """

    episode: int
    turn: int
    result: Start | Reply | Failure
    seconds: float = field(default=0.0, compare=False)


class _Player(ChildProcess):
    """A worker process.

    Attributes:
        episodes: episodes that it plays, with the turn that it has not answered and its deadline, or None.
        is_retired: True if a thread of it hangs, so that it begins no further episode.
    """

    def __init__(self, program: WorkerProgram, output: WorkerOutput, mark: str) -> None:
        self.episodes: dict[int, tuple[int, float] | None] = {}
        self.is_retired = False
        super().__init__(program, output, mark)


class EnvironmentPool:
    """Plays episodes in `num_workers` processes, many at the same time in each.

    Any thread may call `start`, `step`, `end` and `take`. One thread of the pool serves the processes. An episode fails
    if its environment raises, takes longer than `timeout_s` for a turn, or loses its process. Other episodes are not
    affected, except those in a process that died. The processes end with the pool and with the process that owns it.

    Args:
        spec: the environment.
        num_workers: number of processes.
        episodes_per_worker: number of episodes that a process plays at the same time; further ones wait.
        timeout_s: seconds per turn, by the clock. The process of a turn that takes longer begins no further episode and
            is replaced once its other episodes have ended.
        key: key path of the environment's block, for errors and warnings.
        start_timeout_s: seconds to import the environment.
        max_memory_mb: MiB that a process may allocate; None for no limit.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        num_workers: int,
        episodes_per_worker: int,
        timeout_s: float,
        key: str,
        start_timeout_s: float = 120.0,
        max_memory_mb: int | None = None,
    ) -> None:
        self._key = key
        self._num_workers = num_workers
        self._episodes_per_worker = episodes_per_worker
        self._timeout_s = timeout_s
        self._program = WorkerProgram(
            module="roll_gspo.environments.worker",
            setup=Setup(spec, max_memory_mb, episodes_per_worker),
            key=key,
            title=f"environment {spec.name}",
            start_timeout_s=start_timeout_s,
            error=PlayError,
            python=spec.python,
        )
        self._mark = uuid.uuid4().hex
        self._output = WorkerOutput(key)
        self._players: list[_Player] = []
        self._player_of: dict[int, _Player] = {}
        self._waiting: list[Command] = []  # beginnings of episodes for which no process has room
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._changed = threading.Condition()  # guards the attributes below
        self._played: list[Played] = []
        self._error: BaseException | None = None
        self._busy_s = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"play {key}", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _kill_all, self._players, os.getpid())

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def busy_seconds(self) -> float:
        """Seconds that environments have taken for their turns, summed over episodes."""
        with self._changed:
            return self._busy_s

    @property
    def pids(self) -> list[int]:
        """Process ids of the current workers."""
        return [player.pid for player in list(self._players)]

    def check(self, row: Mapping[str, Any] | None, limit_s: float) -> None:
        """Check that an episode can begin, before heavy work. The episode is ended at once.

        Args:
            row: columns of the row; None only checks that the environment can be built.
            limit_s: seconds to wait.

        Raises:
            ConfigError, MissingDependencyError, PlayError: the environment cannot be built, or does not begin.
        """
        self.start(_PROBE, row or {}, 0)
        deadline = time.monotonic() + limit_s
        results: list[Played] = []
        while not results and time.monotonic() < deadline:
            results = self.take(_PROBE_SLICE_S)
        self.end(_PROBE)
        if not results:
            raise ConfigError(f"{self._key}: reset did not end within {limit_s:g} s; raise start_timeout_s")
        result = results[0].result
        if row is not None and isinstance(result, Failure):
            place = f"{self._key}: reset failed on row {row.get('id', '?')}"
            raise ConfigError(f"{place}: {result.reason}\n{result.traceback}".rstrip())

    def start(self, episode: int, row: Mapping[str, Any], seed: int) -> None:
        """Begin an episode; its result is a `Start` or a `Failure` with turn 0."""
        self._send(Command(episode, 0, row, seed))

    def step(self, episode: int, turn: int, answer: str) -> None:
        """Send a turn of the model, counted from 1; its result is a `Reply` or a `Failure`."""
        self._send(Command(episode, turn, answer=answer))

    def end(self, episode: int) -> None:
        """Close an episode, also one that is not done. Unknown and failed episodes are ignored; there is no result."""
        self._send(Command(episode, -1))

    def take(self, timeout_s: float = 0.0) -> list[Played]:
        """Return the results since the last call, in any order. Wait up to `timeout_s` for one.

        Raises:
            ConfigError, MissingDependencyError, PlayError: no process can be started.
        """
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._played or self._error, timeout_s)
            if self._error is not None:
                raise self._error
            taken, self._played = self._played, []
        return taken

    def close(self) -> None:
        """Kill all processes. The pool cannot be used afterwards."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._wake()
        self._thread.join()
        for player in list(self._players):
            self._remove(player)
        kill_marked(self._mark)
        self._output.close()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()
        self._finalizer.detach()

    def _send(self, command: Command) -> None:
        self._commands.put(command)
        self._wake()

    def _wake(self) -> None:
        # `send` fails if a wake-up is already pending (buffer full) or the pool is closed; both are fine.
        with suppress(OSError):
            self._wake_sender.send(b"!")

    # the thread of the pool

    def _run(self) -> None:
        try:
            while not self._closed:
                self._read_commands()
                self._begin_waiting()
                self._poll()
                self._fail_late()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            player = self._player_of.get(command.episode)
            if command.turn == 0:
                self._waiting.append(command)
            elif player is not None:
                self._assign(player, command)
            elif command.turn < 0:
                self._waiting = [waiting for waiting in self._waiting if waiting.episode != command.episode]

    def _begin_waiting(self) -> None:
        while self._waiting:
            usable = [player for player in self._players if not player.is_retired]
            if len(usable) < self._num_workers and len(usable) < len(self._waiting) + len(self._player_of):
                usable.append(self._started())
            ready = [p for p in usable if p.ready and len(p.episodes) < self._episodes_per_worker]
            if not ready:
                return
            self._assign(min(ready, key=lambda player: len(player.episodes)), self._waiting.pop(0))

    def _started(self) -> _Player:
        try:
            player = _Player(self._program, self._output, self._mark)
        except WorkerStartError as error:
            raise PlayError(str(error)) from None
        self._players.append(player)
        self._selector.register(player, selectors.EVENT_READ, player)
        return player

    def _assign(self, player: _Player, command: Command) -> None:
        if command.turn < 0:
            player.episodes.pop(command.episode, None)
            del self._player_of[command.episode]
        else:
            player.episodes[command.episode] = command.turn, time.monotonic() + self._timeout_s
            self._player_of[command.episode] = player
        try:
            player.send(command)
        except OSError:
            self._lose(player)
        else:
            self._replace_if_unused(player)

    def _poll(self) -> None:
        deadlines = [due for player in self._players for due in _deadlines(player)]
        wait_s = min((due - time.monotonic() for due in deadlines), default=_MAX_WAIT_S)
        for key, _ in self._selector.select(min(max(wait_s, 0.0), _MAX_WAIT_S)):
            if key.data is None:
                self._wake_receiver.recv(4096)
            elif key.data in self._players:
                self._receive(key.data)

    def _receive(self, player: _Player) -> None:
        if not player.ready:
            self._receive_ready(player)
            return
        try:
            for message in player.receive():
                self._take_answer(player, message)
        except (EOFError, OSError, KeyError, TypeError):
            self._lose(player)

    def _receive_ready(self, player: _Player) -> None:
        try:
            player.receive_start()
        except WorkerStartError as error:
            self._failed_starts += 1
            self._remove(player)
            if self._failed_starts > _MAX_CONSECUTIVE_FAILED_STARTS:
                raise PlayError(str(error)) from None
            logger.warning("%s; starting another worker", error)
        else:
            self._failed_starts = 0

    def _take_answer(self, player: _Player, message: Mapping[str, Any]) -> None:
        episode, turn = message["episode"], message["turn"]
        pending = player.episodes.get(episode)
        if turn < 0 or pending is None or pending[0] != turn:
            return  # ended, or failed by its deadline
        result = _result_of(message)
        spent = time.monotonic() - (pending[1] - self._timeout_s)
        player.episodes[episode] = None
        if isinstance(result, Failure):
            self._assign(player, Command(episode, -1))
        self._publish(Played(episode, turn, result, spent))

    def _publish(self, played: Played) -> None:
        with self._changed:
            self._played.append(played)
            self._busy_s += played.seconds
            self._changed.notify_all()

    def _fail_late(self) -> None:
        now = time.monotonic()
        for player in list(self._players):
            if not player.ready and now >= player.deadline:
                player.raise_start_timeout()
            late = [(e, due[0]) for e, due in player.episodes.items() if due is not None and now >= due[1]]
            for episode, turn in late:
                player.is_retired = True  # one of its threads hangs
                del player.episodes[episode], self._player_of[episode]
                failure = Failure(f"timeout after {self._timeout_s:g} s")
                self._publish(Played(episode, turn, failure, self._timeout_s))
            if late:
                self._replace_if_unused(player)

    def _replace_if_unused(self, player: _Player) -> None:
        if player.is_retired and not player.episodes and player in self._players:
            self._remove(player)

    def _lose(self, player: _Player) -> None:
        """Fail all episodes of a process that died."""
        reason = f"its worker process {self._remove(player)}"
        for episode, pending in player.episodes.items():
            del self._player_of[episode]
            self._publish(Played(episode, pending[0] if pending else -1, Failure(reason)))

    def _remove(self, player: _Player) -> str:
        self._selector.unregister(player)
        self._players.remove(player)
        return player.kill()


def _deadlines(player: _Player) -> list[float]:
    if not player.ready:
        return [player.deadline]
    return [pending[1] for pending in player.episodes.values() if pending is not None]


def _result_of(message: Mapping[str, Any]) -> Start | Reply | Failure:
    if "failed" in message:
        return Failure(str(message["failed"]), str(message["traceback"]))
    if "start" in message:
        start = message["start"]
        return Start(tuple(start["messages"]), tuple(start["tools"]))
    reply = dict(message["reply"])
    return Reply(tuple(reply.pop("messages")), **reply)


def _kill_all(players: list[_Player], owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork of the owner must not kill the owner's workers
        for player in players:
            player.kill()
