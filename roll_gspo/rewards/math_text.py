r"""One notation for a formula: spaces, digit groups, mixed numbers, repeating decimals, e-notation, upright letters.

Every pattern is linear in the length of the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **dict(zip("，．：；（）［］｛｝＝％＋－／、", ",.:;()[]{}=%+-/,", strict=True)),
        **dict.fromkeys("−–‐‑﹣", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **{"×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset "},
        **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "°": r"^\circ ", "√": r"\sqrt "},
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
# Models write `10^-5` and `2^10` for `10^{-5}` and `2^{10}`.
_LOOSE_EXPONENT = re.compile(r"\^ ?(-\d+|\d\d+)(?![\d.])")
_SYSTEM = re.compile(
    r"\\begin ?\{(?:cases|aligned|align\*?|array)\}(?: ?\{[lcr|]*\})?(.*?)\\end ?\{(?:cases|aligned|align\*?|array)\}"
)
# `\!` moves its neighbours together; after a comma it marks a group of digits.
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|^\$|(?<!\\)\$$")
_GROUP_COMMA = re.compile(r"\{,\}|,\s?\\!\s?")
_SPACES = re.compile(r"(?:(?<!\\)\\[,;:>! ]|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick|en)space(?![A-Za-z])|[~\s])+")
_LAYOUT = re.compile(r"\\(?:displaystyle|textstyle|limits|m?left|m?right|[bB]igg?[lr]?|boxed|fbox)(?![A-Za-z]) ?")
_DOT_DELIMITER = re.compile(r"\\(?:left|right)\s?\.")
_STYLE = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|textbf|textit)\s?(?=\{)")
_UPRIGHT_CONSTANT = re.compile(r"\\(?:text(?:rm|normal)?|mathrm|operatorname|rm)\s?\{\s?([eiE])\s?\}")
_LOOSE_UPRIGHT_CONSTANT = re.compile(r"\{\\rm\s?([ei])\}")
_GROUPED = re.compile(r"(?<![\d.,}])\d{1,3}(?:\{,\}\d{3})+(?!\d)")
_SPACED = re.compile(r"(?<![\w.,}/])\d{1,3}(?: \d{3}){1,40}(?![\d/])(?! ?/)(?! \d)")
_SPACED_DECIMALS = re.compile(r"(?<=\.)\d{3}(?: \d{3})*(?: \d{1,3})(?![\d/])")
_BRACKET_OR_COMMAS = re.compile(r"\\[{}]|[()\[\]]|(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_E_NOTATION = re.compile(r"(?<![\w.])(?:(\d*\.\d+)[eE]([+-]?\d+)|(\d+)(?:e(\+\d+|-?\d\d+)|E([+-]?\d+)))(?![\w.])")
_SHORT_E_NOTATION = re.compile(r"(?<![\w.])(\d+)e(-?\d)(?![\w.])")
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbracket|widehat)\s?(?:\{(\d+)\}|(\d))"
    r"((?:\d*\\dot\s?(?:\{\d\}|\d))?)|\((\d+)\)(?![\w(^]))"
)
_OVERLINED = re.compile("(?:\\d\u0305)+")
_ELLIPSIS = re.compile(r"(?<![\d.])(\d*)\.(\d{3,40})\s?(?:\\[lc]?dots(?![A-Za-z])|\.\.\.|…)")
_MIXED = re.compile(
    r"(?<![\w.}^)/\\])(\d+)(?: ?\\[dtc]?frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))| (\d+) ?/ ?(\d+)(?![\w.]))"
)
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z{])(pi|sqrt)(?![A-Za-z])")
_WHOLE_TEXT = re.compile(r"\\(?:text(?:rm|normal)?|mathrm|mbox)\s?\{([^{}]*\d[^{}]*)\}")
_SEVERAL_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?(?: -?\d+(?:\.\d+)?)+")
_MAX_DIGITS = 400


def normalize(formula: str) -> str:
    r"""Return the formula in one notation.

    * Spaces of LaTeX and Unicode are one plain space. Layout commands, bold type and a final full stop are removed.
    * Digit groups (`1,234`, `1\,234`, `1 234`, `1{,}234`) are joined. A comma joins only outside of brackets, and only
      if all commas between two spaces belong to one number; others separate values.
    * Mixed numbers (`2 2/3`, `2\frac23`), repeating decimals (`0.\overline{3}`, `0.(3)`) and `1e-05` become fractions.
    * Upright `\mathrm{e}` and `\text{i}` are the constants, not units. `\text` around a whole answer is removed if it
      contains digits.
    * Numbers between spaces that form no group (`3 4`) are a list.
    """
    text = _GROUP_COMMA.sub("{,}", formula.translate(_CHARACTERS)).replace("{:}", ":")
    text = _DELIMITER.sub("", text.replace("\\varnothing", "\\emptyset"))
    text = _SUPERSCRIPT.sub(lambda found: rf"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SPACES.sub(" ", _DOT_DELIMITER.sub(" ", text)).strip()
    text = _SYSTEM.sub(lambda found: found[1].replace("\\\\", ", ").replace("&", "").strip(" ,"), text)
    text = _UPRIGHT_CONSTANT.sub(r"\1", _LOOSE_UPRIGHT_CONSTANT.sub(r"\1", _STYLE.sub("", _LAYOUT.sub("", text))))
    text = text.strip().rstrip(".。 ") if not text.endswith("...") else text.strip()
    text = _unwrap_braces(text)
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole[1].strip()
    for pattern in (_GROUPED, _SPACED, _SPACED_DECIMALS):
        text = pattern.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _join_commas(text).replace("{,}", ",")
    text = _E_NOTATION.sub(
        lambda found: _power_of_ten(found[1] or found[3], found[found.lastindex or 0], found[0]), text
    )
    text = _OVERLINED.sub(lambda found: rf"\overline{{{found[0].replace(chr(0x305), '')}}}", text)
    text = _PLAIN_NAME.sub(r"\\\1 ", text).replace("**", "^")
    text = _LOOSE_EXPONENT.sub(r"^{\1}", text)
    text = _ELLIPSIS.sub(_from_ellipsis, _REPEATING.sub(_from_repeating, text))
    text = _MIXED.sub(_from_mixed, text)
    return text.replace(" ", ",") if _SEVERAL_NUMBERS.fullmatch(text) else text


def read_short_e_notation(text: str) -> str | None:
    """Return a normalized text with `2e-1` as a power of ten, or None if it has none. It may also mean `2e - 1`."""
    changed = _SHORT_E_NOTATION.sub(lambda found: _power_of_ten(found[1], found[2], found[0]), text)
    return changed if changed != text else None


def _unwrap_braces(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and not text.endswith("\\}"):
        depth = 0
        for index, character in enumerate(text):
            depth += (character == "{") - (character == "}")
            if depth == 0 and index < len(text) - 1:
                return text
        text = text[1:-1].strip()
        if len(text) > 2 and text[0] == "{":  # nested braces are no notation of an answer; avoid quadratic time
            return text
    return text


def _join_commas(text: str) -> str:
    depth = 0
    parts: list[str] = []
    position = 0
    for found in _BRACKET_OR_COMMAS.finditer(text):
        token = found[0]
        if token in ("(", "[", "\\{"):
            depth += 1
        elif token in (")", "]", "\\}"):
            depth -= 1
        elif depth <= 0:
            parts += [text[position : found.start()], token.replace(",", "")]
            position = found.end()
    return "".join([*parts, text[position:]])


def _power_of_ten(mantissa: str, exponent: str, original: str) -> str:
    if len(mantissa) > _MAX_DIGITS or len(exponent) > 4 or abs(int(exponent)) > _MAX_DIGITS:
        return original
    mantissa = "0" + mantissa if mantissa.startswith(".") else mantissa.rstrip(".")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}"


def _from_repeating(found: re.Match[str]) -> str:
    whole, start = found[1], found[2]
    block = re.sub(r"\\dot|\D", "", (found[3] or found[4] or "") + (found[5] or "")) or found[6]
    if len(whole) + len(start) + len(block) > _MAX_DIGITS:
        return found[0]
    value = Fraction(int(whole + start + block or "0") - int(whole + start or "0"), 10 ** len(start))
    return _fraction(value / (10 ** len(block) - 1))


def _from_ellipsis(found: re.Match[str]) -> str:
    """Read `0.1666...` as 1/6 if the digits end with three equal digits, or with a block that occurs twice."""
    whole, digits = found[1], found[2]
    for size in range(1, len(digits) // 2 + 1):
        block = digits[-size:]
        if digits.endswith(block * (3 if size == 1 else 2)):
            start = digits
            while start.endswith(block):
                start = start.removesuffix(block)
            value = Fraction(int(whole + start + block) - int(whole + start or "0"), 10 ** len(start))
            return _fraction(value / (10 ** len(block) - 1))
    return f"{whole}.{digits}"


def _from_mixed(found: re.Match[str]) -> str:
    top = found[2] or found[3] or found[6]
    bottom = found[4] or found[5] or found[7]
    if len(found[0]) > _MAX_DIGITS or not int(top) < int(bottom):
        return found[0]
    return rf"\frac{{{int(found[1]) * int(bottom) + int(top)}}}{{{int(bottom)}}}"


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
