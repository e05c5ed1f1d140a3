r"""Units after a number: which ones may be dropped, which ones carry meaning, and amounts of several units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_WRAPPER = r"\\(?:text(?:rm|normal|sf|up|bf|it)?|math(?:rm|sf|bf|it)|[mh]box|operatorname|unit|si)\s?\{[^{}]*\}"
_EXPONENT = r"(?: ?\^ ?(?:\{ ?-?\d ?\}|-?\d)|[²³])?"
_DEGREE = r"\^ ?(?:\{ ?\\circ ?\}|\\circ|\{ ?\\degree ?\})|\\degree(?![A-Za-z])"
_TRAILING = re.compile(
    rf"(?: ?(?:{_DEGREE}) ?(?:[CFK](?![A-Za-z])|{_WRAPPER})?| ?(?:\\cdot |[/*])? ?{_WRAPPER}{_EXPONENT}"
    rf"| ?\\[dt]?frac ?\{{ ?{_WRAPPER} ?\}} ?\{{ ?{_WRAPPER}{_EXPONENT} ?\}}"
    r"|(?<=\d)\^ ?\{? ?(?:\\text ?\{ ?)?(?:st|nd|rd|th) ?\}? ?\}?)+ ?$"
)
_NUMBER = r"[-+]? ?(?:\d+(?:\.\d*)?|\.\d+)"
_LITERAL = rf"{_NUMBER}(?: ?/ ?\d+)?|[-+]?\\[dtc]?frac ?\{{\d+\}} ?\{{\d+\}}"
_PLAIN = re.compile(rf"({_LITERAL}) ?([A-Za-z][A-Za-z ./'-]*{_EXPONENT})")
_CJK_WORD = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,8}"
_CJK = re.compile(rf"^{_CJK_WORD} ?|(?<=[\d}})]) ?{_CJK_WORD}$")
_WRAPPED = re.compile(r"\\(?:text\w*|math\w+|[mh]box|operatorname|unit|si)\s?\{([^{}]*)\}")
_AMOUNT = re.compile(rf"({_NUMBER}(?: ?/ ?\d+)?|\\frac\{{\d+\}}\{{\d+\}})([^\d\\]*)")
_CLOCK = re.compile(
    r"\b(\d{1,2})(?: ?: ?(\d\d))? {0,3}([ap]) ?\. ?m\b\.?|\b(\d{1,2})(?: ?: ?(\d\d))? {0,3}([ap])m\b", re.IGNORECASE
)
_MAGNITUDE = re.compile(rf"({_NUMBER}) ?(thousand|million|billion|trillion)s?\b(.*)", re.IGNORECASE)
_POWER_OF_TEN = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "noon", "midnight")
_MEANINGFUL = frozenset({*_MONTHS, *(m[:3] for m in _MONTHS), "sept", *_DAYS, "ad", "bc", "bce", "ce"})
_CONNECTIVES = frozenset(
    {"and", "or", "mod", "modulo", "to", "remainder", "plus", "minus", "times", "over", "under", "divided", "not"}
    | {"sin", "cos", "tan", "cot", "log", "ln", "exp"}
)
_FILLERS = frozenset({"of", "the", "st", "nd", "rd", "th", "at", "on", "and", "o'clock"})
_OPPOSITES = tuple(
    (frozenset(first.split()), frozenset(second.split()))
    for first, second in (
        ("gain profit increase more rise higher above", "loss decrease less fewer drop lower below fall"),
        ("left", "right"), ("north n", "south s"), ("east e", "west w"), ("before ago earlier", "after later"),
        ("clockwise", "counterclockwise anticlockwise"), ("forward", "backward"), ("up", "down"), ("even", "odd"),
    )
)  # fmt: skip
# (dimension, factor): names
_UNITS = {
    ("time", "1/1000"): "ms millisecond", ("time", "1"): "s sec second", ("time", "60"): "min minute",
    ("time", "3600"): "h hr hour", ("time", "86400"): "day", ("time", "604800"): "week wk",
    ("months", "1"): "month", ("months", "12"): "year yr",
    ("length", "1/1000"): "mm millimeter millimetre", ("length", "1/100"): "cm centimeter centimetre",
    ("length", "1"): "m meter metre", ("length", "1000"): "km kilometer kilometre",
    ("length", "0.0254"): "in inch inche", ("length", "0.3048"): "ft foot feet", ("length", "0.9144"): "yd yard",
    ("length", "1609.344"): "mi mile", ("mass", "1/1000"): "mg milligram", ("mass", "1"): "g gram gm",
    ("mass", "1000"): "kg kilogram", ("mass", "28.349523125"): "oz ounce", ("mass", "453.59237"): "lb pound",
    ("volume", "1/1000"): "ml milliliter millilitre", ("volume", "1"): "l liter litre",
    ("money", "1"): "dollar usd", ("money", "1/100"): "cent penny pennie",
    ("temperature C", "1"): "degc", ("temperature F", "1"): "degf",
}  # fmt: skip
_MEASURES = {name: (kind, Fraction(factor)) for (kind, factor), names in _UNITS.items() for name in names.split()}


@dataclass(frozen=True)
class Unit:
    """A unit that was dropped from a number.

    Attributes:
        words: words of the unit in lower case.
        measure: (dimension, factor to its base unit), or None if the unit is unknown.
    """

    words: frozenset[str] = frozenset()
    measure: tuple[str, Fraction] | None = None

    def contradicts(self, other: Unit) -> bool:
        """Return whether both units name opposites, e.g. a gain and a loss, or measures of different dimensions."""
        if self.measure and other.measure:
            return self.measure[0] != other.measure[0]
        return any(
            (self.words & one and other.words & two) or (self.words & two and other.words & one)
            for one, two in _OPPOSITES
        )


NO_UNIT = Unit()


def split_unit(text: str) -> tuple[str, Unit]:
    r"""Split a trailing unit from a normalized formula. A unit that carries meaning stays, e.g. `and 3 hens`, `June`.

    A unit is text in `\text{}`, a degree sign, an ordinal ending, or words after a number. Letters without `\text{}`
    that may be variables stay: `2s`, `3ab`.
    """
    found = _TRAILING.search(text)
    if found and text[: found.start()].strip():
        core, suffix = text[: found.start()].strip(), found[0]
    elif plain := _PLAIN.fullmatch(text):
        core, suffix = plain[1], plain[2]
        if not _is_plain_unit(suffix, spaced=text[plain.end(1)] == " "):
            return text, NO_UNIT
    else:
        return _CJK.sub("", text) if re.search(r"\d", text) else text, NO_UNIT
    words = _words(_unwrapped(suffix))
    if set(words) & (_MEANINGFUL | _CONNECTIVES) or any(
        re.search(r"\d", wrapped) for wrapped in _WRAPPED.findall(suffix)
    ):
        return text, NO_UNIT
    if _WRAPPED.search(core) or re.search(r"[=<>+*/^_,(-]$", core):
        return text, NO_UNIT
    return core, Unit(frozenset(words), _measure(_unwrapped(suffix)))


def clock_or_date(text: str) -> tuple[str, ...] | None:
    """Return the parts of a time of day or a date, in a fixed order for dates, or None if the text is neither."""
    plain = _unwrapped(text)
    has_clock = _CLOCK.search(plain) is not None
    if (not has_clock and not set(_words(plain)) & _MEANINGFUL) or re.search(r"[\\{}^_=]", plain):
        return None
    plain = _CLOCK.sub(_minutes, plain)
    parts = [word for word in re.findall(r"\d+(?::\d+)?|#\d+|[a-z']+", plain.lower()) if word not in _FILLERS]
    parts = ["sep" if word == "sept" else word[:3] if word in _MONTHS else word for word in parts]
    if not any(character.isdigit() for word in parts for character in word):
        return None
    return tuple(sorted(parts) if {month[:3] for month in _MONTHS} & set(parts) else parts)


def amounts(text: str) -> tuple[tuple[Fraction, str], ...] | None:
    """Return (number, unit) of at least two amounts, `2 hours 30 minutes`, sorted by unit; or None.

    Amounts of one dimension are added: `2 hours 30 minutes` equals `150 minutes`.
    """
    plain = _unwrapped(text)
    if re.search(r"[{}^_=+<>|]", plain.replace("\\frac{", "").replace("}{", "").replace("}", "")):
        return None
    found = _AMOUNT.findall(plain)
    if len(found) < 2 or _AMOUNT.sub("", plain).strip():
        return None
    found_amounts: list[tuple[Fraction, str]] = []
    for number, unit in found:
        words = [word for word in _words(unit) if word not in ("and", "of")]
        if not words or len(number) > 40 or all(len(word) < 2 and word not in _MEASURES for word in words):
            return None
        found_amounts.append((_fraction(number), " ".join(words)))
    if len({unit for _, unit in found_amounts}) < len(found_amounts):  # a list of values, not one in several units
        return None
    totals: dict[str, Fraction] = {}
    for number, unit in found_amounts:
        kind, factor = _MEASURES.get(unit, (unit, Fraction(1)))
        totals[kind] = totals.get(kind, Fraction(0)) + number * factor
    return tuple(sorted(((value, kind) for kind, value in totals.items()), key=lambda amount: amount[1]))


def expand_magnitude(text: str) -> str:
    r"""Return `3 million` as `3 \times 10^{6}`, with the text that follows it."""
    if "illion" not in text and "housand" not in text:
        return text
    found = _MAGNITUDE.fullmatch(_unwrapped(text).strip())
    if not found:
        return text
    rest = rf"\text{{{found[3]}}}" if found[3].strip() else ""
    return rf"{found[1]} \times 10^{{{_POWER_OF_TEN[found[2].lower()]}}}{rest}"


def _is_plain_unit(suffix: str, *, spaced: bool) -> bool:
    words = _words(suffix)
    known = all(word in _MEASURES for word in words) and len(words) > 0
    if not spaced:
        return (known and len(words[0]) > 1) or words in (["st"], ["nd"], ["rd"], ["th"])
    return known or any(len(word) > 2 for word in words)


def _measure(suffix: str) -> tuple[str, Fraction] | None:
    found = re.fullmatch(
        r"[\s/.]*((?:square|sq|cubic|cu)\b\.?)? ?([A-Za-z]+)\.? ?(?:\^ ?\{? ?(\d) ?\}?|([²³]))?[\s.]*", suffix
    )
    degrees = re.search(r"circ\s*\}?\s*([CF])", suffix)
    name = f"deg{degrees[1].lower()}" if degrees else _singular(found[2].lower()) if found else ""
    if name not in _MEASURES:
        return None
    kind, factor = _MEASURES[name]
    power = 1
    if found:
        power = {"s": 2, "c": 3}.get((found[1] or " ")[0], 1) if not found[3] else int(found[3])
        power = {"²": 2, "³": 3}.get(found[4] or "", power)
    return (kind, factor) if power == 1 else (f"{kind}^{power}", factor**power)


def _unwrapped(text: str) -> str:
    return re.sub(" +", " ", _WRAPPED.sub(lambda found: f" {found[1]} ", text))


def _words(text: str) -> list[str]:
    text = re.sub(r"\\[A-Za-z]+", " ", text).lower()
    text = re.sub(r"\b([a-z])\. ?(?=[a-z]\b)", r"\1", text)
    return [_singular(word) for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text)]


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _minutes(found: re.Match[str]) -> str:
    hour, minute, half = (found[1], found[2], found[3]) if found[1] else (found[4], found[5], found[6])
    return f" #{int(hour) % 12 * 60 + int(minute or 0) + 720 * (half.lower() == 'p')} "


def _fraction(number: str) -> Fraction:
    if found := re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", number):
        return Fraction(int(found[1]), int(found[2]) or 1)
    top, _, bottom = number.replace(" ", "").partition("/")
    return Fraction(top) / (int(bottom or 1) or 1)
