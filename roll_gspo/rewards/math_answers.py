r"""Structure of an answer: a number or formula, a tuple or set, named values, amounts, or a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from roll_gspo.rewards.math_bounds import MAX_CHARS
from roll_gspo.rewards.math_text import normalize, read_short_e_notation
from roll_gspo.rewards.math_units import NO_UNIT, Unit, amounts, clock_or_date, expand_magnitude, split_unit

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGN = re.compile(r"^(?:[-+] ?)+")
_NUMBER = re.compile(_DECIMAL)
_SLASH = re.compile(rf"({_DECIMAL}) ?/ ?(-?{_DECIMAL})")
_ARGUMENT = rf"(?:\{{ ?(-? ?{_DECIMAL}) ?\}}|(\d))"
_FRACTION = re.compile(rf"\\[dtc]?frac ?{_ARGUMENT} ?{_ARGUMENT}")
_SCIENTIFIC = re.compile(rf"(?:({_DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?10 ?\^ ?(?:\{{ ?([-+]?\d+) ?\}}|(\d))")
_PERCENT = re.compile(r"^(.+?) ?(?:\\?%|\\text ?\{ ?(?:%|\\%|percent|per cent) ?\}|percent|per cent)$", re.DOTALL)
_CURRENCY = re.compile(r"^([-+]?) ?(?:US)?(?:\\?\$|€|£|¥|₹|\\pounds|\\euro) ?|(?<=[\d}]) ?(?:\\\$|€|£|¥|₹)$")
_DOLLAR = Unit(frozenset({"dollar"}), ("money", Fraction(1)))

_NAME = (
    r"(?:m? ?(?:\\(?:angle|triangle) ?)?[A-Za-z]{1,3}'*|\\(?!text|frac|sqrt|math)[A-Za-z]+"
    r"|\\(?:text|mathrm) ?\{[^{}]*\})(?: ?_ ?(?:\w|\{[^{}]*\}))?(?: ?\( ?[A-Za-z] ?\))?"
)
_NAMED = re.compile(rf"({_NAME}) ?= ?([^=<>]+)", re.DOTALL)
_CHAIN = re.compile(rf"({_NAME}) ?=(?!=)[^<>;,]*=(?!=) ?([^=<>;,]+)", re.DOTALL)
_NAMED_TUPLE = re.compile(r"(\([^()=]+\)|[A-Za-z](?: ?, ?[A-Za-z])+) ?= ?([(\[].*[)\]])", re.DOTALL)
_SPACE_BEFORE_NAME = re.compile(rf"(?<=[\w)}}])(?<! and)(?<! or) (?={_NAME} ?=(?!=))")
_MEMBER = re.compile(r"^[A-Za-z] ?\\in(?![A-Za-z]) ?(?=[(\[\\])")
_SEPARATOR = re.compile(
    r"(?: ?[,;] ?(?:(?:and|or)\b ?|\\text ?\{ ?(?:and|or) ?\} ?)?| (?:and|or) | ?\\text ?\{ ?(?:and|or) ?\} ?)"
)
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "\\lbrace": "\\rbrace", "\\langle": "\\rangle"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[(){}\[\],;]|(?<= )(?:and|or)(?= )", re.DOTALL)
_SPACES = re.compile(r"(?:\s|~|\\q?quad(?![A-Za-z])|(?<!\\)\\[,;:> ])+")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_MAX_DIGITS = 400
_MAX_DEPTH = 3


@dataclass(frozen=True)
class Literal:
    """A rational number as it was written.

    Attributes:
        value: its exact value.
        is_decimal: True if it has a decimal point, so that it may be rounded.
        is_integer: True if it is written with digits only.
    """

    value: Fraction
    is_decimal: bool = False
    is_integer: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number or formula.

    Attributes:
        text: normalized formula without its unit.
        literal: its value if it is a rational number, else None.
        unit: the unit that was dropped.
        is_percent: True if a percent sign was dropped.
    """

    text: str
    literal: Literal | None = None
    unit: Unit = NO_UNIT
    is_percent: bool = False


@dataclass(frozen=True)
class Group:
    """A list of answers. `opening` and `closing` are its brackets, empty for values without brackets."""

    opening: str
    closing: str
    items: tuple[Answer, ...]
    text: str


@dataclass(frozen=True)
class Named:
    """Values with names, at least one."""

    names: tuple[str, ...]
    items: tuple[Answer, ...]
    text: str


@dataclass(frozen=True)
class Amounts:
    """At least two amounts with units, or a time or date: equal only to equal parts."""

    parts: tuple[object, ...]


Answer: TypeAlias = Scalar | Group | Named | Amounts


def read_answer(formula: str) -> Answer:
    """Return the structure of a formula.

    A formula of more than `MAX_CHARS` characters without spaces has none; it equals only the same text.
    """
    formula = _SPACES.sub(" ", formula)
    return _read(normalize(formula)) if len(formula) <= MAX_CHARS else Scalar(formula)


def readings(answer: Answer) -> tuple[Answer, ...]:
    r"""Return the answer and its other readings: `2e-1` is 0.2 or `2e - 1`, and a single `\pm 3` is two values."""
    if isinstance(answer, Scalar) and (short := read_short_e_notation(answer.text)) is not None:
        return answer, _read(short)
    return (answer,)


def read_literal(text: str) -> Literal | None:
    """Return a rational number in normalized notation, or None: an integer, decimal, fraction or power of ten."""
    sign = 1
    if found := _SIGN.match(text):
        sign = -1 if found[0].count("-") % 2 else 1
        text = text[found.end() :]
    if len(text) > _MAX_DIGITS:
        return None
    if _NUMBER.fullmatch(text):
        is_decimal = "." in text and bool(text.partition(".")[2])
        return Literal(sign * Fraction(text.rstrip(".")), is_decimal, not is_decimal)
    if found := _SLASH.fullmatch(text):
        return _ratio(sign, found[1], found[2])
    if found := _FRACTION.fullmatch(text):
        return _ratio(sign, found[1] or found[2], found[3] or found[4])
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int(found[2] or found[3])
        if abs(exponent) <= _MAX_DIGITS:
            mantissa = found[1] or "1"
            return Literal(sign * Fraction(mantissa.rstrip(".")) * Fraction(10) ** exponent, "." in mantissa)
    return None


def _ratio(sign: int, top: str, bottom: str) -> Literal | None:
    denominator = Fraction(bottom.replace(" ", "").rstrip("."))
    if not denominator:
        return None
    value = sign * Fraction(top.replace(" ", "").rstrip(".")) / denominator
    return Literal(value, "." in top + bottom)


def _read(text: str, depth: int = 0) -> Answer:
    text = _strip_parentheses(_MEMBER.sub("", text))
    if (named := _read_named(text, depth)) is not None:
        return named
    if (parts := clock_or_date(text) or amounts(text)) is not None:
        return Amounts(tuple(parts))
    if (group := _read_group(text, depth)) is not None:
        return group
    return _read_scalar(text)


def _strip_parentheses(text: str) -> str:
    """Remove parentheses around a single value."""
    while (
        text.startswith("(")
        and (inner := _inner(text, "("))
        and inner[1] == ")"
        and len(split_top_level(inner[0])) == 1
    ):
        text = inner[0]
    return text


def _read_scalar(text: str) -> Scalar:
    if (literal := read_literal(text)) is not None:
        return Scalar(text, literal)
    if found := _PERCENT.match(text):
        return Scalar(found[1], read_literal(found[1]), is_percent=True)
    core, unit = split_unit(expand_magnitude(_CURRENCY.sub(r"\1", text)))
    if core != text and unit is NO_UNIT and "$" in text:
        unit = _DOLLAR
    if (percent := _PERCENT.match(core)) and core != text:
        return Scalar(percent[1], read_literal(percent[1]), unit, is_percent=True)
    return Scalar(core, read_literal(core), unit)


def _read_named(text: str, depth: int) -> Named | Group | None:
    if "=" not in text or depth > _MAX_DEPTH:
        return None
    if found := _NAMED_TUPLE.fullmatch(text):
        names = [part.strip() for part in re.split(",", found[1].strip("() "))]
        values = _read_group(found[2], depth + 1)
        if isinstance(values, Group) and len(values.items) == len(names):
            return Named(tuple(names), values.items, text)
    pieces = split_top_level(_SPACE_BEFORE_NAME.sub(", ", text)) if text.count("=") > 1 else [text]
    found_all = [_NAMED.fullmatch(piece) for piece in pieces]
    if len(pieces) == 1 and found_all[0] is None and (chain := _CHAIN.fullmatch(text)):
        found_all = [chain]
    matches = [found for found in found_all if found]
    if not matches or (len(matches) < len(pieces) and "=" in "".join(pieces[1:])):
        return None
    if len(matches) < len(pieces):  # x = 3 or 4
        values = [matches[0][2], *pieces[1:]]
        return Group("", "", tuple(_read(value.strip(), depth + 1) for value in values), text)
    names = tuple(re.sub(r"[\s{}]", "", found[1]) for found in matches)
    items = tuple(_read(found[2].strip(), depth + 1) for found in matches)
    if len(set(names)) < len(names):  # several solutions for one unknown
        return Group("", "", items, text)
    return Named(names, items, text)


def _read_group(text: str, depth: int) -> Group | None:
    if depth > _MAX_DEPTH:
        return None
    opening = next((token for token in _BRACKETS if text.startswith(token)), "")
    if opening and (inner := _inner(text, opening)) is not None:
        content, closing = inner
        items = split_top_level(content)
        if len(items) > 1 or closing in ("\\}", "\\rbrace"):
            if closing in ("\\}", "\\rbrace"):
                opening, closing = "\\{", "\\}"
            elif opening == "\\langle":
                opening, closing = "(", ")"
            return Group(opening, closing, _read_items(items, depth), text) if all(items) else None
        return None
    if _PLUS_MINUS.search(text) or "," in text or ";" in text or " or " in text or " and " in text or "\\text" in text:
        items = split_top_level(text)
        if (len(items) > 1 and all(items)) or len(_PLUS_MINUS.findall(text)) == 1:
            return Group("", "", _read_items(items, depth), text)
    return None


def _read_items(items: list[str], depth: int) -> tuple[Answer, ...]:
    expanded = []
    for item in items:
        both = len(_PLUS_MINUS.findall(item)) == 1
        expanded += [_PLUS_MINUS.sub(sign, item).strip() for sign in ("+", "-")] if both else [item]
    return tuple(_read(item.removeprefix("+").strip(), depth + 1) for item in expanded)


def _inner(text: str, opening: str) -> tuple[str, str] | None:
    """Return (content, closing bracket) if the opening bracket is closed at the end of the text."""
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("(", "[", "{", "\\{", "\\lbrace", "\\langle"):
            depth += 1
        elif token[0] in (")", "]", "}", "\\}", "\\rbrace", "\\rangle"):
            depth -= 1
            if depth == 0:
                ends = token.end() == len(text)
                fits = token[0] == _BRACKETS[opening] or (opening in "([" and token[0] in ")]")
                return (text[len(opening) : token.start()].strip(), token[0]) if ends and fits else None
    return None


def split_top_level(text: str) -> list[str]:
    """Split at commas, semicolons, `and` and `or` outside of brackets and braces."""
    parts, start, depth, position = [], 0, 0, 0
    while (token := _TOKEN.search(text, position)) is not None:
        position = token.end()
        if token[0] in ("(", "[", "{", "\\{", "\\lbrace", "\\langle"):
            depth += 1
        elif token[0] in (")", "]", "}", "\\}", "\\rbrace", "\\rangle"):
            depth -= 1
        elif depth == 0 and token[0] in (",", ";", "and", "or", "\\text"):
            separator = _SEPARATOR.match(text, token.start() - (text[token.start() - 1 : token.start()] == " "))
            if separator and separator.end() > token.start():
                parts.append(text[start : separator.start()].strip())
                start = position = separator.end()
    return [*parts, text[start:].strip()]
