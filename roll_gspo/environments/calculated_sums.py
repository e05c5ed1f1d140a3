"""Demonstrations of `tool_use`: sums such as `347+86=`, which the model calculates with the tool `calc`.

Calls have the format `mistral`, which is the shortest: every byte is a token of the builtin models.
"""

from __future__ import annotations

import json
import random

from roll_gspo.data.column_addition import training_sums

NAME = "calculated_sums"


def demonstrations(num: int, seed: int, slip_probability: float) -> list[list[dict[str, str]]]:
    """Return the messages of `num` episodes with training sums; see `calculated_sum`."""
    rng = random.Random(seed)
    sums = training_sums(rng)
    return [calculated_sum(*next(sums), rng, slip_probability) for _ in range(num)]


def calculated_sum(a: int, b: int, rng: random.Random, slip_probability: float = 0.0) -> list[dict[str, str]]:
    """Return the messages of an episode: the question, a call of the calculator, its result, and the answer.

    A slip is a guess instead of a call. It has a wrong digit.

    Args:
        a, b: numbers to add.
        rng: draws the slips.
        slip_probability: probability of a slip.
    """
    total = str(a + b)
    question = {"role": "user", "content": f"{a}+{b}="}
    if rng.random() < slip_probability:
        return [question, {"role": "assistant", "content": _with_wrong_digit(total, rng)}]
    arguments = json.dumps({"expression": f"{a}+{b}"}, separators=(",", ":"))
    return [
        question,
        {"role": "assistant", "content": f"[TOOL_CALLS]calc{arguments}"},
        {"role": "tool", "content": total},
        {"role": "assistant", "content": total},
    ]


def _with_wrong_digit(number: str, rng: random.Random) -> str:
    place = rng.randrange(len(number))
    digits = [digit for digit in "0123456789" if digit != number[place] and (place or digit != "0")]
    return number[:place] + rng.choice(digits) + number[place + 1 :]
