r"""The final answer of a response: the last `\boxed{}`, else the formula or number after "answer is", else the last."""

from __future__ import annotations

import re
from typing import NamedTuple

from roll_gspo.rewards.final_answer import boxes

_SPACES = re.compile(r"(?:\\q?quad(?![A-Za-z])|(?<!\\)\\[,;]|[ \t~])+")
_BLANK_LINES = re.compile(r"(?: ?\n){3,} ?")
_MAX_SENTENCE = 1_000
_MAX_FORMULA = 1_000
_MAX_TAIL = 3_000
_BETWEEN_BOXES = re.compile(r"(?<!\w)(?:and|or)(?!\w)|[,;]|\\text|\$")
_FINAL = re.compile(r"final answer|最终答案|最終的な答え", re.IGNORECASE)
_ANSWER = re.compile(
    r"(?<![A-Za-z])(?<!to )answers?(?![A-Za-z])(?=[^\n]{0,100}?(?:(?<![A-Za-z])(?:is|are|be)(?![A-Za-z])|[:=：$\d]))"
    r"|答案|答え|答[:：]|정답",
    re.IGNORECASE,
)
_END_OF_SENTENCE = re.compile(r"[.!?](?=\s+[A-Z]|\s*\n\s*\n)|\n\s*\n|。(?!$)")
_VERB = re.compile(r"(?<![A-Za-z])(?:is|are|be)(?![A-Za-z])|[:：]|是|为|為|は")

_NUMBER = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_EXPONENT = r"(?:[eE][-+]?\d+(?!\w))?"
_TERM = rf"-?{_NUMBER}{_EXPONENT}(?: \d+/\d+(?!\d))?"
_MEASURE = (
    r"(?:hours?|hrs?|h|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|feet|foot|ft|inch(?:es)?|in|yards?"
    r"|miles?|pounds?|lbs?|ounces?|oz|dollars?|cents?|(?:kilo|centi|milli)?(?:meters?|metres?|grams?)|[kcm]?m|k?g)"
)
_OPERATION = r"\s?[-+*/×÷^:]\s?"
_ASSIGNMENT = rf"[A-Za-z] ?= ?{_TERM}"
_SUFFIX = r"[ap]\. ?m\.?|[ap]m(?![a-z])|(?:thousand|million|billion|trillion)(?![a-z])|\\?%|percent(?![a-z])"
# Numbers may touch a colon and Chinese, Japanese or Korean text, but no Latin letter on their left.
_PLAIN = re.compile(
    rf"(?<![A-Za-z0-9_\\]){_ASSIGNMENT}(?:(?:, ?|,? (?:and|or) ){_ASSIGNMENT})+"
    rf"|[(\[] ?{_TERM}(?: ?, ?{_TERM})+ ?[)\]]"
    r"|-?\\[dtc]?frac\{-?[\d.]{1,20}\}\{-?[\d.]{1,20}\}"
    rf"|(?<![A-Za-z0-9_.\\/^])(?:-?[$€£¥₹])?{_TERM}"
    rf"(?: ?{_MEASURE}(?:,? (?:and )?{_TERM} ?{_MEASURE})+(?![A-Za-z])"
    rf"|(?:{_OPERATION}\(?{_TERM}\)?){{1,10}}(?![A-Za-z]))?"
    rf"(?: ?(?:{_SUFFIX}))?",
    re.IGNORECASE,
)
_LIST = re.compile(rf"{_TERM}(?:(?:, ?|,? (?:and|or) ){_TERM}){{1,20}}")
_PERCENT = re.compile(r"\s?(?:\\?%|[Pp]ercent(?![a-z]))")
_CLOSING = {
    opening: re.compile(rf"(?<!\\){re.escape(closing)}")
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
}
_OPENING = re.compile(r"(?<!\\)(?:\$\$|\\\[|\\\(|(?<!\d)\$(?=[^$\n]))")


def final_formulas(text: str) -> list[str]:
    r"""Return the formulas that may be the answer, best first: at most the last box, and the last boxes as a list."""
    found = [box for box in boxes(text) if box.content.strip()]
    if found:
        last = [found[-1]]
        for box in reversed(found[:-1]):
            between = text[box.end : last[0].start]
            if len(between) >= 70 or (len(between) >= 10 and not _BETWEEN_BOXES.search(between)):
                break
            last.insert(0, box)
        contents = list(dict.fromkeys(box.content.strip() for box in last))
        return [found[-1].content] if len(contents) < 2 else [found[-1].content, ", ".join(contents)]
    text = _BLANK_LINES.sub("\n\n", _SPACES.sub(" ", text)).strip().replace("−", "-")
    for anchor in (_FINAL, _ANSWER):
        if (formula := _formula_after_anchor(text, anchor)) is not None:
            return [formula]
    formulas = _formulas(_end_of(text))
    return [formulas[-1].text] if formulas else []


def _end_of(text: str) -> str:
    """Return the last characters of a text, from the start of a line if possible."""
    end = text[-_MAX_TAIL:]
    line_start = end.find("\n") + 1 if len(text) > _MAX_TAIL else 0
    return end[line_start:] if end[line_start:].strip() else end


class _Formula(NamedTuple):
    start: int
    end: int
    text: str


def _formula_after_anchor(text: str, anchor: re.Pattern[str]) -> str | None:
    """Return the first formula in the sentence after the last anchor, or what it equals: 7 of `3 + 4 = 7`."""
    position = max((found.end() for found in anchor.finditer(text)), default=None)
    if position is None:
        return None
    sentence = text[position : position + _MAX_SENTENCE]
    if (verb := _VERB.search(sentence[:120])) is not None:
        sentence = sentence[verb.end() :]
    sentence = sentence.lstrip()
    if (end := _END_OF_SENTENCE.search(sentence)) is not None:
        sentence = sentence[: end.start()]
    if _LIST.fullmatch(sentence.strip(" .\n")):
        return sentence.strip(" .\n")
    chosen: _Formula | None = None
    for formula in _formulas(sentence):
        if chosen is not None and sentence[chosen.end : formula.start].strip(" *_") != "=":
            break
        chosen = formula
    return chosen and chosen.text


def _formulas(text: str) -> list[_Formula]:
    """Return the delimited formulas, and the numbers and plain expressions between them, in order."""
    found: list[_Formula] = []
    position = 0
    while (opening := _OPENING.search(text, position)) is not None:
        start = opening.end()
        closing = _CLOSING[opening[0]].search(text, start, start + _MAX_FORMULA)
        end = closing.start() if closing else start
        if closing is None or (opening[0] == "$" and "\n" in text[start:end]):
            found += _plain_formulas(text, position, start)
            position = start
            continue
        found += _plain_formulas(text, position, opening.start())
        position = end + len(opening[0])
        percent = _PERCENT.match(text, position)
        found.append(_Formula(opening.start(), position, text[start:end] + ("\\%" if percent else "")))
        position = percent.end() if percent else position
    return found + _plain_formulas(text, position, len(text))


def _plain_formulas(text: str, start: int, end: int) -> list[_Formula]:
    return [_Formula(*found.span(), found[0]) for found in _PLAIN.finditer(text, start, end)]
