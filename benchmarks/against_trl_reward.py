"""The reward of `against_trl.py`. Random weights get different scores, so that every group has a gradient."""

from __future__ import annotations


def digit_share(text: str) -> float:
    """Return the share of digits among the characters of a response."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def reward(prompt: str, response: str, ground_truth: str) -> float:
    """Return `digit_share`, as a reward function of this project."""
    return digit_share(response)
