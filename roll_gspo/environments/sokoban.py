"""`sokoban`: push every box onto a target. The options have the names of ROLL's environment.

    ######
    #_P__#
    #_X__#
    #_O__#
    ######

The rewards are those of gym-sokoban: -0.1 per answer, 1 for a box that reaches a target, -1 for a box that leaves one,
and 10 if all boxes are on targets.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
from roll_gspo.environments.sokoban_rooms import Room, drawn_room, pushed, shortest_solution

_INSTRUCTION = (
    "Push every box onto a target. You push a box by walking into it. A box cannot be pulled, "
    "and neither a wall nor another box gives way. Write one action per turn, for example <answer>Right</answer>."
)
_SYMBOLS = {0: "#", 1: "_", 2: "O", 3: "√", 4: "X", 5: "P", 6: "S"}
_MEANINGS = {
    **{"#": "wall", "_": "floor", "O": "target", "√": "box on a target"},
    **{"X": "box", "P": "player", "S": "player on a target"},
}
_ACTIONS = {1: "Up", 2: "Down", 3: "Left", 4: "Right"}
_STEP, _ON_TARGET, _FINISHED = -0.1, 1.0, 10.0


class Sokoban(GridGame):
    """A room with boxes. There is a solution of `max_steps` or fewer moves.

    Args:
        dim_room: number of rows and of columns, with the walls around the room.
        num_boxes: number of boxes and of targets.
        search_depth: largest number of moves, played backwards from the solved room, that place the boxes.
        max_steps: number of answers after which the game is lost.
        style: `full` or `compact`; see `GridText`. The character of a box on a target is `*` with `compact`.
        grid_lookup: characters of wall, floor, target, box on a target, box, player, and player on a target, by 0 to 6.
        grid_vocab: what each character stands for.
        action_lookup: names of up, down, left, and right, by 1 to 4.
        env_instruction: first lines of the first prompt.
        format_penalty: added to the reward of an answer that names no action.
        action_pattern: regular expression whose last group is the action.
        special_token_list: texts that are removed from an answer.
        render_mode: `text`.
    """

    DIRECTIONS: ClassVar[Mapping[int, Cell]] = {1: UP, 2: DOWN, 3: LEFT, 4: RIGHT}

    def __init__(
        self,
        dim_room: Sequence[int] = (10, 10),
        num_boxes: int = 4,
        search_depth: int = 300,
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
            env_instruction or _INSTRUCTION,
            codes(grid_lookup, _SYMBOLS | ({3: "*"} if style == COMPACT else {}), "grid_lookup"),
            grid_vocab or _MEANINGS,
            codes(action_lookup, _ACTIONS, "action_lookup"),
            action_pattern,
            special_token_list or (),
        )
        super().__init__(text, max_steps, format_penalty)
        self._height, self._width = dim_room
        self._num_boxes = num_boxes
        self._search_depth = min(search_depth, max_steps)
        self.room = Room(frozenset(), frozenset(), frozenset(), (0, 0))

    def cells(self) -> list[list[int]]:
        return [[self._code((y, x)) for x in range(self._width)] for y in range(self._height)]

    def best_action(self) -> int | None:
        moves = shortest_solution(self.room)
        return next(action for action, step in self.DIRECTIONS.items() if step == moves[0]) if moves else None

    def _begin(self, seed: int) -> None:
        self.room = drawn_room(seed, (self._height, self._width), self._num_boxes, self._search_depth)

    def _stay(self) -> Move:
        return Move(_STEP, moved=False)

    def _move(self, action: int) -> Move:
        before, self.room = self.room, pushed(self.room, self.DIRECTIONS[action])
        reached = len(self.room.boxes & self.room.targets) - len(before.boxes & before.targets)
        won = self.room.is_solved
        reward = _STEP + _ON_TARGET * reached + (_FINISHED if won else 0.0)
        return Move(reward, self.room.player != before.player, over=won, won=won)

    def _code(self, cell: Cell) -> int:
        room, on_target = self.room, cell in self.room.targets
        if cell not in room.floor:
            return 0
        if cell == room.player:
            return 6 if on_target else 5
        if cell in room.boxes:
            return 3 if on_target else 4
        return 2 if on_target else 1


def demonstrations(num: int, seed: int, slip_probability: float) -> list[list[dict[str, str]]]:
    """Return the messages of `num` episodes with the rooms of even seeds; see `demonstration`."""
    rng = random.Random(seed)
    game = Sokoban(dim_room=(5, 5), num_boxes=1, max_steps=6, style=COMPACT)
    return [demonstration(game, 2 * rng.randrange(2**40), rng, slip_probability) for _ in range(num)]
