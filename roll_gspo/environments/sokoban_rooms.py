"""Rooms of Sokoban: their rules, their generation from a seed, and a solver."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from roll_gspo.environments.grid import DOWN, LEFT, RIGHT, UP, Cell
from roll_gspo.errors import ConfigError

_STEPS = (UP, DOWN, LEFT, RIGHT)
_MAX_ROOMS = 200
_NUM_WALKS = 60
_PULL_PROBABILITY, _TURN_PROBABILITY = 0.8, 0.4
_MAX_STATES = 100_000


@dataclass(frozen=True)
class Room:
    """A position. All cells but those of the floor are walls."""

    floor: frozenset[Cell]
    targets: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell

    @property
    def is_solved(self) -> bool:
        """True if all boxes are on targets."""
        return self.boxes == self.targets


def pushed(room: Room, step: Cell) -> Room:
    """Return the room after a move of the player; the same room if the move is impossible."""
    there = _plus(room.player, step)
    if there not in room.floor:
        return room
    if there not in room.boxes:
        return replace(room, player=there)
    behind = _plus(there, step)
    if behind not in room.floor or behind in room.boxes:
        return room
    return replace(room, player=there, boxes=room.boxes - {there} | {behind})


def shortest_solution(room: Room, max_states: int = _MAX_STATES) -> list[Cell] | None:
    """Return the fewest moves that solve a room; None if there are none, or more than `max_states` positions."""
    came_from: dict[tuple[Cell, frozenset[Cell]], tuple[Room, Cell] | None] = {(room.player, room.boxes): None}
    todo = deque([room])
    while todo and len(came_from) <= max_states:
        current = todo.popleft()
        if current.is_solved:
            return _moves_to(current, came_from)
        for step in _STEPS:
            following = pushed(current, step)
            key = following.player, following.boxes
            if key not in came_from:
                came_from[key] = current, step
                todo.append(following)
    return None


def _moves_to(room: Room, came_from: dict[tuple[Cell, frozenset[Cell]], tuple[Room, Cell] | None]) -> list[Cell]:
    moves: list[Cell] = []
    while (origin := came_from[room.player, room.boxes]) is not None:
        room, step = origin
        moves.append(step)
    return moves[::-1]


def drawn_room(seed: int, shape: tuple[int, int], num_boxes: int, max_moves: int) -> Room:
    """Return a room with a solution of at most `max_moves` moves.

    The solved room is played backwards, by pulling boxes. Playing these moves forwards is the proof of the solution.

    Args:
        seed: seed of the room.
        shape: number of rows and of columns, with the walls around the room.
        num_boxes: number of boxes.
        max_moves: largest number of moves.

    Raises:
        ConfigError: no such room was found.
    """
    rng = random.Random(seed)
    for _ in range(_MAX_ROOMS):
        solved = _solved_room(rng, shape, num_boxes)
        if solved is None:
            continue
        walks = [_pulled(solved, rng, max_moves) for _ in range(_NUM_WALKS)]
        room, moves = max(walks, key=lambda walk: _difficulty(walk[0]))
        if not room.is_solved and _played(room, moves).is_solved:
            return room
    raise ConfigError(
        f"env_config.num_boxes: no room of {shape[0]} x {shape[1]} cells with {num_boxes} boxes was found; use fewer "
        "boxes or a larger dim_room"
    )


def _solved_room(rng: random.Random, shape: tuple[int, int], num_boxes: int) -> Room | None:
    """Return a room whose boxes are on targets, or None if its floor is too small."""
    inner = [(y, x) for y in range(1, shape[0] - 1) for x in range(1, shape[1] - 1)]
    if not inner:
        return None
    cell, step = rng.choice(inner), rng.choice(_STEPS)
    floor = {cell}
    for _ in range(5 * len(inner)):
        if rng.random() < _TURN_PROBABILITY:
            step = rng.choice(_STEPS)
        if _plus(cell, step) in inner:
            cell = _plus(cell, step)
            floor.add(cell)
    if len(floor) < 3 * num_boxes + 1:
        return None
    *targets, player = rng.sample(sorted(floor), num_boxes + 1)
    return Room(frozenset(floor), frozenset(targets), frozenset(targets), player)


def _pulled(room: Room, rng: random.Random, max_moves: int) -> tuple[Room, list[Cell]]:
    """Play a room backwards at random, and return the room and the moves that lead back."""
    moves: list[Cell] = []
    for _ in range(max_moves):
        free = [step for step in _STEPS if _is_free(room, _plus(room.player, step))]
        if not free:
            break
        pulls = [step for step in free if _minus(room.player, step) in room.boxes]
        step = rng.choice(pulls if pulls and rng.random() < _PULL_PROBABILITY else free)
        box, boxes = _minus(room.player, step), room.boxes
        if box in boxes and rng.random() < _PULL_PROBABILITY:
            boxes = boxes - {box} | {room.player}
        room = replace(room, player=_plus(room.player, step), boxes=boxes)
        moves.append((-step[0], -step[1]))
    return room, moves[::-1]


def _difficulty(room: Room) -> tuple[int, int]:
    """Return the number of boxes off targets, and the sum of their distances to the nearest target."""
    off = room.boxes - room.targets
    distances = (min(abs(y - v) + abs(x - u) for v, u in room.targets) for y, x in off)
    return len(off), sum(distances)


def _played(room: Room, moves: list[Cell]) -> Room:
    for step in moves:
        room = pushed(room, step)
    return room


def _is_free(room: Room, cell: Cell) -> bool:
    return cell in room.floor and cell not in room.boxes


def _plus(cell: Cell, step: Cell) -> Cell:
    return cell[0] + step[0], cell[1] + step[1]


def _minus(cell: Cell, step: Cell) -> Cell:
    return cell[0] - step[0], cell[1] - step[1]
