"""`builtin:multi_domain`: short tasks of four domains, shipped with the package.

The domains are `math` (sums and word problems), `multiple_choice` (a letter in a box), `code` (one-line Python
functions and programs) and `instructions` (a sentence in a given form). Each row also has a correct `response`, for
supervised pretraining.
"""

from __future__ import annotations

import json
import random
from itertools import zip_longest
from pathlib import Path

from roll_gspo.data.rows import DataRow, read_rows

FILE_NAME = "builtin:multi_domain"
DOMAINS = ("math", "multiple_choice", "code", "instructions")
_FOLDER = Path(__file__).with_name("shipped")


def files(split: str) -> list[str]:
    """Return the files of `train` or `validation`, one per domain."""
    return [str(_file(domain, split)) for domain in DOMAINS]


def rows(split: str) -> list[DataRow]:
    """Return all rows of `train` or `validation`, alternating between the domains."""
    turns = zip_longest(*(read_rows([file], FILE_NAME) for file in files(split)))
    return [row for turn in turns for row in turn if row is not None]


def demonstrations(num: int, seed: int, slip_probability: float) -> list[tuple[str, str]]:
    """Return `num` pairs (prompt, response) of training rows, equally many per domain.

    Args:
        num: number of pairs.
        seed: seed of the selection.
        slip_probability: probability that a response is replaced by that of another row.
    """
    rng = random.Random(seed)
    pairs = {domain: _pairs(domain) for domain in DOMAINS}
    demonstrated = []
    for number in range(num):
        domain = pairs[DOMAINS[number % len(DOMAINS)]]
        prompt, response = rng.choice(domain)
        if rng.random() < slip_probability:
            response = rng.choice([other for _, other in domain if other != response])
        demonstrated.append((prompt, response))
    return demonstrated


def _file(domain: str, split: str) -> Path:
    return _FOLDER / f"{domain}_{split}.jsonl"


def _pairs(domain: str) -> list[tuple[str, str]]:
    lines = _file(domain, "train").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
