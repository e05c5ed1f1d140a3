r"""`multiple_choice_boxed` and `crossthinkqa`: the option letters in the last `\boxed{}`."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import Verdict
from roll_gspo.rewards.final_answer import after_thinking, last_box

# (right and boxed, right without a box, wrong in a box, wrong without a box), ROLL's figures
REWARD_TYPES = {
    "loose": (1.0, 1.0, -1.0, -1.0),
    "soft": (1.0, 0.5, -0.5, -1.0),
    "strict": (1.0, -1.0, -1.0, -1.0),
}

_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|bf|rm|left|right|q?quad)(?![A-Za-z])"
)
_DECORATION = re.compile(r"[{}$*\"'~]|\\[,;: ()]")
_LEAD = re.compile(r"^(?:(?:option|options|answer|choice)\b[\s:]*(?:is\b[\s:]*)?)+", re.IGNORECASE)
_LETTER = r"[(\[]*[A-Z][)\]]*"
_LETTERS = rf"{_LETTER}(?:\s*(?:[,;&/、]|,?\s*and\b|\s)\s*{_LETTER})*"
_ALL_LETTERS = re.compile(rf"{_LETTERS}[.。]?")
_LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])\s*(?:[.:)\]]|[–—-](?!\s*[A-Z]\.?$)|(?=\()))\s*(\S.*)", re.DOTALL
)
# The text of one option does not begin with another's letter, nor offer one.
_HEDGE = re.compile(r"^\(?(?:and|or)\b|^[,;/&、]\s*[(\[]?[A-Z]\b|^[(\[]?[A-Z][)\]]|\bor\s+[(\[]?[A-Z](?:[)\]:]|\.\s)")
_SMALL_LETTER = re.compile(r"[(\[]?[a-z][)\]]?\.?")
_PHRASE = re.compile(
    rf"(?i:\banswers?|\bchoice|\boption)\s*(?i:is|are|:)[\s:]*(?i:(?:option|choice)\s+)?({_LETTERS})"
    r"(?=\s*(?:[.,;:!。]|$)|(?<=[)\]])\s+\S)(?!,?\s*(?:and|or)\b)",
    re.M,
)


def option_letters(text: str) -> str | None:
    r"""The options that a text names, in order and separated by commas; None where it names none.

    `B`, `(B)`, `b`, `\text{B}`, `\textbf{(B)}`, `B. its text`, `Option B`; several: `A, C`, `A and C`, `(A)(C)`, `AC`.
    `A or C` and `A-C` name none.
    """
    plain = _LEAD.sub("", _plain(text).strip()).strip()
    if re.fullmatch(r"[A-Z]{2,}", plain):  # a word is not a list of options, letters in order are
        return ",".join(plain) if list(plain) == sorted(set(plain)) else None
    if _ALL_LETTERS.fullmatch(re.sub(r"([)\]])(?=[(\[])", r"\1,", plain)):
        return ",".join(sorted(set(re.findall(r"[A-Z]", plain))))
    if _SMALL_LETTER.fullmatch(plain):
        return re.sub(r"[^a-z]", "", plain).upper()
    if found := _LETTER_AND_TEXT.fullmatch(plain):
        return None if _HEDGE.search(found[4]) else found[1] or found[2] or found[3]
    return None


def _plain(text: str) -> str:
    """Without markup, and with one blank or line end where there are several: the patterns try each of them."""
    text = _DECORATION.sub("", _COMMAND.sub("", unicodedata.normalize("NFKC", text)))
    return re.sub(r"\s+", lambda found: "\n" if "\n" in found[0] else " ", text)


class MultipleChoiceBoxed:
    r"""1 where the last `\boxed{}` names exactly the options of the ground truth, else 0; the verdict has the letters.

    What precedes the last `</think>` does not count. Several options are compared as sets.

    Args:
        answer_phrase: without a box, take the last "answer is (B)" or "Answer: B".

    Raises:
        ValueError: (at a row) the ground truth is no option letter.
    """

    def __init__(self, answer_phrase: bool = False) -> None:
        self._answer_phrase = answer_phrase

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        expected = _expected(ground_truth)
        letters, is_boxed = _chosen(response)
        letters = letters if is_boxed or self._answer_phrase else None
        return Verdict(float(letters == expected), letters)


class CrossThinkQa:
    r"""ROLL's worker for multiple choice that tells right from well-formed: from -1 to 1.

    `loose`: 1 where the answer is right, boxed or by "answer is (B)", else -1. `strict`: 1 only in a box. `soft`: 1 for
    right in a box, 0.5 right without, -0.5 wrong in a box, -1 wrong without. The rest is as in `MultipleChoiceBoxed`.

    Args:
        reward_type: one of the three.

    Raises:
        ConfigError: another `reward_type`.
    """

    def __init__(self, reward_type: str = "soft") -> None:
        if reward_type not in REWARD_TYPES:
            raise ConfigError(f"reward_type: crossthinkqa has {', '.join(REWARD_TYPES)}, not '{reward_type}'")
        self._scores = REWARD_TYPES[reward_type]

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        expected = _expected(ground_truth)
        letters, is_boxed = _chosen(response)
        return Verdict(self._scores[2 * (letters != expected) + (not is_boxed)], letters)


def _expected(ground_truth: str) -> str:
    letters = option_letters(ground_truth)
    if letters is None:
        raise ValueError(f"the ground truth {ground_truth!r} names no option (a letter, or several); correct the row")
    return letters


def _chosen(response: str) -> tuple[str | None, bool]:
    """(letters, whether from a box)"""
    answer = after_thinking(response)
    box = last_box(answer)
    if box is not None:
        return option_letters(box), True
    phrases = _PHRASE.findall(_plain(answer))
    return (option_letters(phrases[-1]) if phrases else None), False
