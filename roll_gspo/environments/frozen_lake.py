"""`frozen_lake`: walk to the goal and avoid the holes. The options have the names of ROLL's environment.

    P__O
    _O__
    ___G

The reward is 1 at the goal, else 0.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from roll_gspo.environments.grid import (
    ANSWER_PATTERN,
    COMPACT,
    DOWN,
    FULL,
    LEFT,
    RIGHT,
    SPECIAL_TOKENS,
    UP,
    Cell,
    GridGame,
    GridText,
    Move,
    check_render_mode,
    codes,
    demonstration,
)
from roll_gspo.errors import ConfigError

_INSTRUCTION = (
    "Walk across the frozen lake to the goal. A step into a hole ends the game. "
    "Write one action per turn, for example <answer>Right</answer>."
)
_SLIPPERY = "The ice is slippery: you may move to the left or right of the direction that you choose. "
_SYMBOLS = {0: "P", 1: "_", 2: "O", 3: "G", 4: "X", 5: "√"}
_MEANINGS = {
    **{"P": "player", "_": "ice", "O": "hole", "G": "goal"},
    **{"X": "player in a hole", "√": "player at the goal"},
}
_ACTIONS = {0: "Left", 1: "Down", 2: "Right", 3: "Up"}
_MAX_DRAWS = 10_000


class FrozenLake(GridGame):
    """A lake with holes. The start and the goal are drawn with the map, and there is a path of `max_steps` or fewer.

    Args:
        size: number of rows and of columns.
        p: probability that a cell is no hole.
        is_slippery: True if a move goes to either side with probability 1/3 each. The seed of the row determines the
            slips, so they are the same for all episodes of a group.
        map_seed: seed of the map; None: the seed of the row.
        max_steps: number of answers after which the game is lost.
        style: `full` or `compact`; see `GridText`.
        grid_lookup: characters of player, ice, hole, goal, player in a hole, and player at the goal, by 0 to 5.
        grid_vocab: what each character stands for.
        action_lookup: names of left, down, right, and up, by 0 to 3.
        env_instruction: first lines of the first prompt.
        format_penalty: added to the reward of an answer that names no action.
        action_pattern: regular expression whose last group is the action.
        special_token_list: texts that are removed from an answer.
        render_mode: `text`.
    """

    DIRECTIONS: ClassVar[Mapping[int, Cell]] = {0: LEFT, 1: DOWN, 2: RIGHT, 3: UP}

    def __init__(
        self,
        size: int = 4,
        p: float = 0.8,
        is_slippery: bool = True,
        map_seed: int | None = None,
        max_steps: int = 20,
        style: str = FULL,
        grid_lookup: Mapping[Any, str] | None = None,
        grid_vocab: Mapping[str, str] | None = None,
        action_lookup: Mapping[Any, str] | None = None,
        env_instruction: str | None = None,
        format_penalty: float = 0.0,
        action_pattern: str = ANSWER_PATTERN,
        special_token_list: Sequence[str] | None = SPECIAL_TOKENS,
        render_mode: str = "text",
    ) -> None:
        check_render_mode(render_mode)
        text = GridText(
            style,
            env_instruction or (_SLIPPERY if is_slippery else "") + _INSTRUCTION,
            codes(grid_lookup, _SYMBOLS, "grid_lookup"),
            grid_vocab or _MEANINGS,
            codes(action_lookup, _ACTIONS, "action_lookup"),
            action_pattern,
            special_token_list or (),
        )
        super().__init__(text, max_steps, format_penalty)
        self._size, self._p, self._is_slippery, self._map_seed = size, p, is_slippery, map_seed
        self._slips = random.Random()
        self.holes: frozenset[Cell] = frozenset()
        self.player = self.goal = (0, 0)

    def cells(self) -> list[list[int]]:
        rows = [[2 if (y, x) in self.holes else 1 for x in range(self._size)] for y in range(self._size)]
        rows[self.goal[0]][self.goal[1]] = 3
        rows[self.player[0]][self.player[1]] = 4 if self.player in self.holes else 5 if self.player == self.goal else 0
        return rows

    def best_action(self) -> int | None:
        distances = self._distances()
        ways = {action: self._neighbour(self.player, action) for action in self.DIRECTIONS}
        return min(
            (action for action, cell in ways.items() if cell != self.player and cell in distances),
            key=lambda action: distances[ways[action]],
            default=None,
        )

    def _begin(self, seed: int) -> None:
        rng = random.Random(seed if self._map_seed is None else self._map_seed)
        self._slips = random.Random(f"{seed}/slips")
        cells = [(y, x) for y in range(self._size) for x in range(self._size)]
        for _ in range(_MAX_DRAWS):
            self.holes = frozenset(cell for cell in cells if rng.random() >= self._p)
            self.player, self.goal = rng.choice(cells), rng.choice(cells)
            self.holes -= {self.player, self.goal}
            distance = self._distances().get(self.player, 0)
            if 0 < distance <= self._max_steps:
                return
        raise ConfigError(
            f"env_config.p: {_MAX_DRAWS} maps with size {self._size} and p {self._p:g} have no path of "
            f"{self._max_steps} or fewer steps to the goal; increase p, size, or max_steps"
        )

    def _move(self, action: int) -> Move:
        before = self.player
        if self._is_slippery:
            action = (action + self._slips.choice((-1, 0, 1))) % len(self.DIRECTIONS)
        self.player = self._neighbour(before, action)
        won = self.player == self.goal
        return Move(float(won), self.player != before, over=won or self.player in self.holes, won=won)

    def _neighbour(self, cell: Cell, action: int) -> Cell:
        (y, x), (dy, dx) = cell, self.DIRECTIONS[action]
        there = (y + dy, x + dx)
        return there if all(0 <= place < self._size for place in there) else cell

    def _distances(self) -> dict[Cell, int]:
        """Return the number of moves to the goal from every cell with a path to it."""
        found, todo = {self.goal: 0}, deque([self.goal])
        while todo:
            cell = todo.popleft()
            for there in self._around(cell):
                if there not in found and there not in self.holes:
                    found[there] = found[cell] + 1
                    todo.append(there)
        return found

    def _around(self, cell: Cell) -> Iterator[Cell]:
        return (self._neighbour(cell, action) for action in self.DIRECTIONS)


def demonstrations(num: int, seed: int, slip_probability: float) -> list[list[dict[str, str]]]:
    """Return the messages of `num` episodes with the lakes of even seeds; see `demonstration`."""
    rng = random.Random(seed)
    game = FrozenLake(size=3, is_slippery=False, max_steps=6, style=COMPACT)
    return [demonstration(game, 2 * rng.randrange(2**40), rng, slip_probability) for _ in range(num)]
