"""`builtin:column_addition`: sums worked out column by column, generated on the spot.

Prompt `347+86=`, answer `7+6+0=13,4+8+1=13,3+0+1=4:433`: the columns from the right with their carries, then
after the colon the sum. A rule can judge it, and a model of half a million parameters can learn it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from roll_gspo.data.rows import DataRow
from roll_gspo.errors import DataError

NAME = "column_addition"
FILE_NAME = f"builtin:{NAME}"
SMALLEST, LARGEST = 10, 999
VALIDATION_SHARE = 16  # one pair of operands in so many is held out
MAX_ROWS = 20_000  # different sums are drawn until there are enough; a split holds over twice as many
SLIPS = (-2, -1, 1, 2)
LARGEST_COLUMN_SUM = 19


def rows(num_rows: int, seed: int, split: str) -> list[DataRow]:
    """`num_rows` different sums; no pair of operands is both in `train` and in `validation`, in either order.

    Raises:
        DataError: `num_rows` is not in 1 to MAX_ROWS.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise DataError(f"{FILE_NAME}: num_rows is {num_rows}; choose 1 to {MAX_ROWS}")
    pairs: dict[tuple[int, int], None] = {}
    for a, b in _pairs(random.Random(f"{seed}/{split}")):
        if _is_held_out(a, b) == (split == "validation"):
            pairs[a, b] = None
            if len(pairs) == num_rows:
                break
    return [
        DataRow(
            id=f"{a}+{b}",
            messages=({"role": "user", "content": f"{a}+{b}="},),
            ground_truth=str(a + b),
            domain=NAME,
            tag=NAME,
        )
        for a, b in pairs
    ]


def demonstrations(num: int, seed: int, slip_probability: float) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of a demonstrator who errs in a column now and then; none of the held-out sums."""
    chance = random.Random(seed)
    shown = ((a, b) for a, b in _pairs(chance) if not _is_held_out(a, b))
    return [(f"{a}+{b}=", work_out(a, b, chance, slip_probability)) for a, b in (next(shown) for _ in range(num))]


def work_out(a: int, b: int, chance: random.Random, slip_probability: float = 0.0) -> str:
    """The answer to `a+b=`; a slip changes a column's sum, and what follows is right for the slipped sum."""
    steps, digits, carry = [], [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        if chance.random() < slip_probability:
            total = chance.choice([total + s for s in SLIPS if 0 <= total + s <= LARGEST_COLUMN_SUM])
        steps.append(f"{x}+{y}+{carry}={total}")
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
    if carry:
        digits.append(str(carry))
    return ",".join(steps) + ":" + "".join(reversed(digits))


def _pairs(chance: random.Random) -> Iterator[tuple[int, int]]:
    while True:
        digits = chance.choice((2, 3)), chance.choice((2, 3))
        a, b = (chance.randrange(10 ** (n - 1), 10**n) for n in digits)
        yield a, b


def _is_held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % VALIDATION_SHARE == 0
