"""`builtin:column_addition`: generated sums, to be solved column by column.

The answer to `347+86=` is `7+6+0=13,4+8+1=13,3+0+1=4:433`: the columns from the right with their carries, and the sum
after the colon. A rule can score it, and a model with 0.5 M parameters can learn it.
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
VALIDATION_INTERVAL = 16  # one of this many pairs of operands is held out
MAX_ROWS = 20_000  # each split has more than twice as many distinct sums, so that drawing new ones stays fast
SLIPS = (-2, -1, 1, 2)
LARGEST_COLUMN_SUM = 19


def rows(num_rows: int, seed: int, split: str) -> list[DataRow]:
    """Return `num_rows` distinct sums. No pair of operands, in either order, is in both `train` and `validation`.

    Raises:
        DataError: `num_rows` is not within 1 to `MAX_ROWS`.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise DataError(f"{FILE_NAME}: num_rows is {num_rows}; use 1 to {MAX_ROWS}")
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
    """Return `num` pairs (prompt, answer) of training sums.

    Args:
        num: number of pairs.
        seed: seed of the sums and of the mistakes.
        slip_probability: probability of a mistake in each column.
    """
    rng = random.Random(seed)
    training = training_sums(rng)
    return [(f"{a}+{b}=", worked_answer(a, b, rng, slip_probability)) for a, b in (next(training) for _ in range(num))]


def training_sums(rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield pairs of numbers of training sums, which are drawn when they are needed."""
    return ((a, b) for a, b in _pairs(rng) if not _is_held_out(a, b))


def worked_answer(a: int, b: int, rng: random.Random, slip_probability: float = 0.0) -> str:
    """Return the answer to `a+b=`. A slip changes the sum of a column; the rest of the answer is consistent with it."""
    steps, digits, carry = [], [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        if rng.random() < slip_probability:
            total = rng.choice([total + s for s in SLIPS if 0 <= total + s <= LARGEST_COLUMN_SUM])
        steps.append(f"{x}+{y}+{carry}={total}")
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
    if carry:
        digits.append(str(carry))
    return ",".join(steps) + ":" + "".join(reversed(digits))


def _pairs(rng: random.Random) -> Iterator[tuple[int, int]]:
    while True:
        digits = rng.choice((2, 3)), rng.choice((2, 3))
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in digits)
        yield a, b


def _is_held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % VALIDATION_INTERVAL == 0
