r"""`multiple_choice_boxed` and `crossthinkqa`: comparison of the option letters in the last `\boxed{}`."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import last_boxed, text_after_thinking

# Scores of (correct boxed, correct unboxed, wrong boxed, wrong unboxed), from ROLL.
REWARD_TYPES = {
    "loose": (1.0, 1.0, -1.0, -1.0),
    "soft": (1.0, 0.5, -0.5, -1.0),
    "strict": (1.0, -1.0, -1.0, -1.0),
}

_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|bf|rm|left|right|q?quad)(?![A-Za-z])"
)
_DECORATION = re.compile(r"[{}$*\"'~]|\\[,;: ()]")
# Chinese, Japanese and Korean have no spaces between words.
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_CJK_LEAD = r"(?:答案|答え|答|选项|選項|选择|選擇|选|選|正解|정답|답)(?:应该是|应为|是|为|為|は|은|는|:|\s){0,4}"
_LEAD = re.compile(
    rf"^(?:(?:option|options|answer|choice)\b[\s:]*(?:is\b[\s:]*)?|(?:故|应|應|正确|正確)?{_CJK_LEAD})+", re.IGNORECASE
)
_CJK_TAIL = re.compile(r"(?:选项|選項|项|項|です|입니다)?[.。]?$")
_LETTER = r"[(\[]*[A-Z][)\]]*"
_LETTERS = rf"{_LETTER}(?:\s*(?:[,;&/、和与與及]|,?\s*and\b|\s)\s*{_LETTER})*"
_ALL_LETTERS = re.compile(rf"{_LETTERS}[.。]?")
_LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])\s*(?:[.:)\]]|[–—-](?!\s*[A-Z]\.?$)|(?=\()))\s*(\S.*)", re.DOTALL
)
# Text of an option that names a second option.
_HEDGE = re.compile(r"^\(?(?:and|or)\b|^[,;/&、]\s*[(\[]?[A-Z]\b|^[(\[]?[A-Z][)\]]|\bor\s+[(\[]?[A-Z](?:[)\]:]|\.\s)")
_SMALL_LETTER = re.compile(r"[(\[]?[a-z][)\]]?\.?")
_PHRASE = re.compile(
    rf"(?:(?i:\banswers?|\bchoice|\boption)\s*(?i:is|are|:)[\s:]*(?i:(?:option|choice)\s+)?|(?<!不){_CJK_LEAD})"
    rf"({_LETTERS})(?=\s*(?:[.,;:!。]|$|{_CJK})|(?<=[)\]])\s+\S)(?!,?\s*(?:(?:and|or)\b|或|还是|還是|또는))",
    re.M,
)


def option_letters(text: str) -> str | None:
    r"""Return the options that a text names, sorted and separated by commas, or None if it names none.

    One option: `B`, `(B)`, `b`, `\text{B}`, `\textbf{(B)}`, `B. its text`, `Option B`. Several options: `A, C`,
    `A and C`, `(A)(C)`, `AC`. `A or C` and `A-C` name no option.
    """
    plain = _CJK_TAIL.sub("", _LEAD.sub("", _strip_markup(text).strip())).strip()
    if re.fullmatch(r"[A-Z]{2,}", plain):  # letters in alphabetical order are options, others are a word
        return ",".join(plain) if list(plain) == sorted(set(plain)) else None
    if _ALL_LETTERS.fullmatch(re.sub(r"([)\]])(?=[(\[])", r"\1,", plain)):
        return ",".join(sorted(set(re.findall(r"[A-Z]", plain))))
    if _SMALL_LETTER.fullmatch(plain):
        return re.sub(r"[^a-z]", "", plain).upper()
    if found := _LETTER_AND_TEXT.fullmatch(plain):
        return None if _HEDGE.search(found[4]) else found[1] or found[2] or found[3]
    return None


def _strip_markup(text: str) -> str:
    """Remove markup and collapse whitespace, on whose runs the patterns would backtrack."""
    text = _DECORATION.sub("", _COMMAND.sub("", unicodedata.normalize("NFKC", text)))
    return re.sub(r"\s+", lambda found: "\n" if "\n" in found[0] else " ", text)


class MultipleChoiceBoxed:
    r"""Score 1 if the last `\boxed{}` names exactly the options of the ground truth, else 0.

    Text before the last `</think>` is ignored. Several options are compared as sets. The output's answer is the option
    letters of the response.

    Args:
        answer_phrase: if True, a response without a box is scored by its last "answer is (B)" or "Answer: B".

    Raises:
        ValueError: the ground truth of a row names no option.
    """

    def __init__(self, answer_phrase: bool = False) -> None:
        self._answer_phrase = answer_phrase

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        expected = _parse_ground_truth(ground_truth)
        letters, is_boxed = _parse_response(text_after_thinking(prompt, response))
        letters = letters if is_boxed or self._answer_phrase else None
        return RewardOutput(float(letters == expected), letters)


class CrossThinkQa:
    r"""Score a multiple-choice answer and its format between -1 and 1, as ROLL's `CrossThinkQARuleRewardWorker` does.

    An answer is boxed, or given by a phrase such as "answer is (B)". Parsing works as in `MultipleChoiceBoxed`.

    | `reward_type` | correct, boxed | correct, phrase | wrong, boxed | wrong, phrase or none |
    |---|---|---|---|---|
    | `loose` | 1 | 1 | -1 | -1 |
    | `soft` | 1 | 0.5 | -0.5 | -1 |
    | `strict` | 1 | -1 | -1 | -1 |

    Args:
        reward_type: row of the table.

    Raises:
        ConfigError: `reward_type` is unknown.
    """

    def __init__(self, reward_type: str = "soft") -> None:
        if reward_type not in REWARD_TYPES:
            raise ConfigError(
                f"crossthinkqa: reward_type '{reward_type}' is unknown; use one of {', '.join(REWARD_TYPES)}"
            )
        self._scores = REWARD_TYPES[reward_type]

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        expected = _parse_ground_truth(ground_truth)
        letters, is_boxed = _parse_response(text_after_thinking(prompt, response))
        return RewardOutput(self._scores[2 * (letters != expected) + (not is_boxed)], letters)


def _parse_ground_truth(ground_truth: str) -> str:
    letters = option_letters(ground_truth)
    if letters is None:
        raise ValueError(f"the ground truth {ground_truth!r} names no option letter; correct the row")
    return letters


def _parse_response(answer: str) -> tuple[str | None, bool]:
    """Return (option letters or None, True if they are boxed)."""
    box = last_boxed(answer)
    if box is not None:
        return option_letters(box), True
    phrases = _PHRASE.findall(_strip_markup(answer))
    return (option_letters(phrases[-1]) if phrases else None), False
