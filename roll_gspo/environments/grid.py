"""Games on a grid of characters, which the model plays by naming directions."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from roll_gspo.environments.base import Environment, Reply, Start
from roll_gspo.errors import ConfigError

FULL, COMPACT = "full", "compact"
UP, DOWN, LEFT, RIGHT = (-1, 0), (1, 0), (0, -1), (0, 1)
ANSWER_PATTERN = r"<answer>(.*?)</answer>"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")

Cell = tuple[int, int]


class Move(NamedTuple):
    """Result of a move: its reward, whether the player moved, and whether the game is over or won."""

    reward: float
    moved: bool
    over: bool = False
    won: bool = False


@dataclass(frozen=True)
class GridText:
    """The prompts and answers of a game.

    Attributes:
        style: `full`: instructions, names of the symbols, and an action within `action_pattern`. `compact`: only the
            rows, and an answer that is the first letter of an action.
        instruction: first lines of the first prompt, with `full`.
        symbols: character of each code of a cell.
        meanings: what each character stands for, with `full`.
        actions: name of each action.
        pattern: regular expression of an answer with `full`; its last group is the name of the action.
        special_tokens: texts that are removed from an answer.
    """

    style: str
    instruction: str
    symbols: Mapping[int, str]
    meanings: Mapping[str, str]
    actions: Mapping[int, str]
    pattern: str = ANSWER_PATTERN
    special_tokens: Sequence[str] = SPECIAL_TOKENS

    def __post_init__(self) -> None:
        if self.style not in (FULL, COMPACT):
            raise ConfigError(f"env_config.style: unknown style {self.style!r}; use {FULL} or {COMPACT}")
        if self.style == COMPACT and len({name[0].lower() for name in self.actions.values()}) < len(self.actions):
            names = ", ".join(self.actions.values())
            raise ConfigError(f"env_config.action_lookup: two of {names} begin alike; with style compact they must not")

    def action_of(self, answer: str) -> int | None:
        """Return the action that an answer names, or None."""
        for token in self.special_tokens:
            answer = answer.replace(token, "")
        if self.style == COMPACT:
            names = {name[0].lower(): action for action, name in self.actions.items()}
        else:
            found = re.search(self.pattern, answer, re.DOTALL)
            if found is None:
                return None
            answer = found.groups()[-1] if found.groups() else found[0]
            names = {name.lower(): action for action, name in self.actions.items()}
        return names.get(answer.strip().lower())

    def answer_of(self, action: int) -> str:
        """Return an answer that names an action."""
        name = self.actions[action]
        return name[0] if self.style == COMPACT else f"<answer>{name}</answer>"

    def rows(self, cells: Sequence[Sequence[int]]) -> str:
        """Return the grid as text."""
        return "\n".join("".join(self.symbols[code] for code in row) for row in cells)

    def first(self, cells: Sequence[Sequence[int]]) -> str:
        """Return the first prompt."""
        if self.style == COMPACT:
            return self.rows(cells)
        meanings = ", ".join(f"{symbol} {meaning}" for symbol, meaning in self.meanings.items())
        names = ", ".join(self.actions.values())
        return f"{self.instruction}\nSymbols: {meanings}\nActions: {names}\n\n{self.rows(cells)}"

    def following(self, cells: Sequence[Sequence[int]], action: int | None, moved: bool, moves_left: int) -> str:
        """Return the prompt after a turn."""
        if self.style == COMPACT:
            return self.rows(cells)
        if action is None:
            effect = f"Your answer names no action. Write for example {self.answer_of(next(iter(self.actions)))}."
        elif moved:
            effect = f"You moved: {self.actions[action]}."
        else:
            effect = f"{self.actions[action]} had no effect."
        return f"{effect}\nMoves left: {moves_left}\n\n{self.rows(cells)}"


class GridGame(Environment):
    """A game of one player on a grid. The seed of the row determines the map; rows need no other column.

    Args:
        text: what the model reads and writes.
        max_steps: number of answers after which the game is lost.
        format_penalty: added to the reward of an answer that names no action.
    """

    DIRECTIONS: ClassVar[Mapping[int, Cell]]  # of each action

    def __init__(self, text: GridText, max_steps: int, format_penalty: float) -> None:
        self.text = text
        self._max_steps = max_steps
        self._format_penalty = format_penalty
        self._num_steps = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        """Draw a map."""
        self._begin(seed)
        self._num_steps = 0
        return Start(({"role": "user", "content": self.text.first(self.cells())},))

    def step(self, answer: str) -> Reply:
        """Move the player."""
        self._num_steps += 1
        action = self.text.action_of(answer)
        move = self._stay() if action is None else self._move(action)
        done = move.over or self._num_steps >= self._max_steps
        metrics = {"action_is_valid": float(action is not None), "action_is_effective": float(move.moved)}
        if done:
            metrics["success"] = float(move.won)
        prompt = self.text.following(self.cells(), action, move.moved, self._max_steps - self._num_steps)
        return Reply(
            () if done else ({"role": "user", "content": prompt},),
            reward=move.reward + (self._format_penalty if action is None else 0.0),
            done=done,
            metrics=metrics,
            invalid=action is None,
        )

    @abstractmethod
    def cells(self) -> list[list[int]]:
        """Return the code of each cell, as `symbols` has them."""

    @abstractmethod
    def best_action(self) -> int | None:
        """Return the first action of a shortest solution, or None if the game cannot be won any more."""

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Draw a map."""

    @abstractmethod
    def _move(self, action: int) -> Move:
        """Play an action."""

    def _stay(self) -> Move:
        """Play no action."""
        return Move(0.0, moved=False)


def demonstration(game: GridGame, seed: int, rng: random.Random, slip_probability: float = 0.0) -> list[dict[str, str]]:
    """Return the messages of an episode of an optimal player with slips. The last message is its last answer.

    Args:
        game: the game; it begins an episode.
        seed: seed of the map.
        rng: draws the slips.
        slip_probability: probability of a random action in each turn.
    """
    messages = [dict(message) for message in game.reset({}, seed).messages]
    while True:
        best = game.best_action()
        if best is None or rng.random() < slip_probability:
            best = rng.choice(list(game.DIRECTIONS))
        answer = game.text.answer_of(best)
        messages.append({"role": "assistant", "content": answer})
        reply = game.step(answer)
        if reply.done:
            return messages
        messages += [dict(message) for message in reply.messages]


def codes(table: Mapping[Any, str] | None, default: Mapping[int, str], key: str) -> dict[int, str]:
    """Return a table from code to text of the configuration, whose keys may be strings.

    Raises:
        ConfigError: the codes are not those of the default.
    """
    if table is None:
        return dict(default)
    found = {int(code): text for code, text in table.items()}
    if found.keys() != default.keys():
        wanted = ", ".join(f"{code} ({text})" for code, text in default.items())
        raise ConfigError(f"env_config.{key}: has {sorted(found)}; give a text for each of {wanted}")
    return found


def check_render_mode(render_mode: str) -> None:
    """Check that the game is to be shown as text.

    Raises:
        ConfigError: it is to be shown as an image.
    """
    if render_mode != "text":
        raise ConfigError(f"env_config.render_mode: {render_mode!r} is not supported; use text")
