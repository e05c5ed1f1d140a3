"""`adding_machine`: add two numbers with a machine that adds single digits.

The model reads `347+86`. Each turn it types the digits of one column, from the right, and the machine shows their sum;
`=` and the digits of the sum end the episode:

    347+86 -> 7+6 -> 13 -> 4+8+1 -> 13 -> 3+1 -> 4 -> =433
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping
from typing import Any

from roll_gspo.environments.base import Environment, Reply, Start
from roll_gspo.errors import DataError

_HELD_OUT = 16  # one of this many pairs belongs to odd seeds, which the validation has
_SUM = re.compile(r"\d(\+\d)+")
_RESULT = re.compile(r"=\d+")
_QUESTION = re.compile(r"\s*(\d+)\s*\+\s*(\d+)\s*=?\s*")


class AddingMachine(Environment):
    """An episode with one sum.

    The reward is 1 for the right sum, else 0. A turn that the machine cannot read shows `?`.

    Args:
        max_invalid: number of unreadable turns after which the episode ends.
    """

    def __init__(self, max_invalid: int = 2) -> None:
        self._max_invalid = max_invalid
        self._num_invalid = 0
        self._sum = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        """Show the sum of a row: its last message is `a+b` or `a+b=`. Without messages, the seed selects it."""
        text = row["messages"][-1]["content"] if "messages" in row else "+".join(map(str, sum_of_seed(seed)))
        numbers = _QUESTION.fullmatch(text)
        if numbers is None:
            raise DataError(f"row {row.get('id', '?')}: {text!r} is no sum of two numbers; write a+b")
        a, b = (int(number) for number in numbers.groups())
        self._sum = a + b
        return Start(({"role": "user", "content": f"{a}+{b}"},))

    def step(self, answer: str) -> Reply:
        """Show the sum of the typed digits, or end the episode."""
        if _RESULT.fullmatch(answer):
            return Reply(reward=float(answer[1:] == str(self._sum)), done=True)
        if _SUM.fullmatch(answer):
            return Reply(({"role": "user", "content": str(sum(int(digit) for digit in answer.split("+")))},))
        self._num_invalid += 1
        done = self._num_invalid > self._max_invalid
        return Reply(() if done else ({"role": "user", "content": "?"},), done=done, invalid=True)


def sum_of_seed(seed: int) -> tuple[int, int]:
    """Return two numbers of two or three digits. No pair belongs both to an even and to an odd seed."""
    rng = random.Random(seed)
    while True:
        a, b = _pair(rng)
        if _is_held_out(a, b) == (seed % 2 == 1):
            return a, b


def demonstrations(num: int, seed: int, slip_probability: float) -> list[list[dict[str, str]]]:
    """Return the messages of `num` episodes with sums of even seeds; see `typed_columns`."""
    rng = random.Random(seed)
    return [typed_columns(*sum_of_seed(2 * rng.randrange(2**40)), rng, slip_probability) for _ in range(num)]


def _pair(rng: random.Random) -> tuple[int, int]:
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices((2, 3), k=2))
    return a, b


def _is_held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % _HELD_OUT == 0


def typed_columns(a: int, b: int, rng: random.Random, slip_probability: float = 0.0) -> list[dict[str, str]]:
    """Return the messages of an episode. A slip leaves out the carry of a column, or types a wrong result.

    Args:
        a, b: the numbers to add.
        rng: draws the slips.
        slip_probability: probability of a slip in each turn.
    """
    messages = [{"role": "user", "content": f"{a}+{b}"}]
    digits, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        column = [number // 10**place % 10 for number in (a, b) if number >= 10**place]
        if carry and rng.random() >= slip_probability:
            column.append(carry)
        if len(column) == 1:
            column.append(0)
        total = sum(column)
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
        messages.append({"role": "assistant", "content": "+".join(map(str, column))})
        messages.append({"role": "user", "content": str(total)})
    result = (str(carry) if carry else "") + "".join(reversed(digits))
    if rng.random() < slip_probability:
        place = rng.randrange(len(result))
        result = result[:place] + str((int(result[place]) + rng.choice((1, 9))) % 10) + result[place + 1 :]
    messages.append({"role": "assistant", "content": f"={result}"})
    return messages
