"""`builtin:multi_domain`: short tasks of four domains that come with this package, written for it.

`math` (sums and word problems), `multiple_choice` (a letter in a box), `code` (one-line Python functions and programs) and
`instructions` (a sentence in a given form). Each row also has a `response` that is right, for a supervised start.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from roll_gspo.data.rows import DataRow, read_rows

FILE_NAME = "builtin:multi_domain"
DOMAINS = ("math", "multiple_choice", "code", "instructions")
_FOLDER = Path(__file__).with_name("shipped")


def files(split: str) -> list[str]:
    """The files of `train` or `validation`, one a domain."""
    return [str(_file(domain, split)) for domain in DOMAINS]


def rows(split: str) -> list[DataRow]:
    """All rows of `train` or `validation`, domain by domain."""
    return read_rows(files(split), FILE_NAME)


def demonstrations(num: int, seed: int, slip_probability: float) -> list[tuple[str, str]]:
    """(prompt, response) pairs of the training rows, all domains alike often; a slip gives another row's response."""
    chance = random.Random(seed)
    pairs = {domain: _pairs(domain) for domain in DOMAINS}
    shown = []
    for number in range(num):
        domain = pairs[DOMAINS[number % len(DOMAINS)]]
        prompt, response = chance.choice(domain)
        if chance.random() < slip_probability:
            response = chance.choice([other for _, other in domain if other != response])
        shown.append((prompt, response))
    return shown


def _file(domain: str, split: str) -> Path:
    return _FOLDER / f"{domain}_{split}.jsonl"


def _pairs(domain: str) -> list[tuple[str, str]]:
    lines = _file(domain, "train").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
