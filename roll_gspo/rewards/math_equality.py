"""Equality of two answers: exact for integers and fractions, relative for decimals, and by value for formulas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.parser import LatexExtractionConfig
from math_verify.utils import timeout
from sympy import Float, I, Mul, Rational, Symbol
from sympy.matrices import ImmutableDenseMatrix, MatrixBase

from roll_gspo.rewards.math_answers import Amounts, Answer, Group, Literal, Named, Scalar, read_literal, readings
from roll_gspo.rewards.math_bounds import UnboundedError, check_bounded, may_parse
from roll_gspo.rewards.math_canonical import canonical_text

RELATIVE_TOLERANCE = Fraction(1, 10**6)
_MAX_ITEMS = 100
_DIGITS = 40
_EXACT_TOLERANCE = 1e-25
# Values of the variables, of both signs, at which two formulas are compared.
_POINTS = (Rational(13, 7), Rational(-17, 11), Rational(5, 23), Rational(-29, 31), Rational(43, 37))
_NUM_POINTS = 3
_DECIMAL = re.compile(r"\.\d")
_RELATION = re.compile(
    r"[<>|]|\\(?:le|ge|lt|gt|ne|neq|leq|geq|cup|cap|in|setminus|mid|leqslant|geqslant|infty)(?![A-Za-z])|\^"
)
_TEXT_KEY = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox)(?![A-Za-z])|[{}\s]")
# Units are split off before, because math-verify drops any number of them, also those that carry meaning.
_EXTRACTION = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
)


class Formulas:
    """Parses formulas with math-verify and compares answers.

    Args:
        timeout_s: limit of each parse and each comparison, by SIGALRM.
    """

    def __init__(self, timeout_s: int) -> None:
        self._timeout_s = timeout_s
        self._compare = timeout(timeout_seconds=timeout_s)(_agree)
        self.parse = lru_cache(maxsize=4096)(self._parse)

    def _parse(self, text: str) -> tuple[Any, ...]:
        """Return the sympy objects of a normalized formula; none if it is too large, or no formula.

        Raises:
            TimeoutError: parsing took too long.
        """
        if not text or not may_parse(text):
            return ()
        try:
            parsed = parse(
                f"\\boxed{{{text}}}",
                extraction_config=[_EXTRACTION],
                fallback_mode="no_fallback",
                parsing_timeout=self._timeout_s,
                raise_on_error=True,
            )
            return tuple(ImmutableDenseMatrix(f) if isinstance(f, MatrixBase) else f for f in parsed)
        except TimeoutException:
            raise TimeoutError(f"math_rule: parsing took longer than timeout_s {self._timeout_s}") from None
        except Exception:  # sympy and its parser raise arbitrary exceptions on text that is no formula
            return ()

    def equal(self, gold: Answer, given: Answer) -> bool:
        """Return whether any readings of two answers are equal.

        Raises:
            TimeoutError: parsing or comparing took too long.
        """
        return any(self._equal(one, other) for one, other in product(readings(gold), readings(given)))

    def canonical(self, answer: Answer) -> str | None:
        """Return one text for equal answers, as far as they are simple, or None if the answer is no formula."""
        if isinstance(answer, Amounts):
            return " ".join(" ".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in answer.parts)
        if isinstance(answer, Scalar):
            scale = 100 if answer.is_percent else 1
            if answer.literal is not None:
                return str(answer.literal.value / scale)
            return canonical_text(
                [Mul(f, Rational(1, scale), evaluate=False) if scale > 1 else f for f in self.parse(answer.text)]
            )
        texts = [self.canonical(item) for item in answer.items]
        if len(texts) == 1:
            return texts[0]
        if isinstance(answer, Named):
            return ", ".join(sorted(f"{name} = {text}" for name, text in zip(answer.names, texts, strict=True)))
        ordered = answer.opening not in ("", "\\{")
        return answer.opening + ", ".join(map(str, texts if ordered else sorted(map(str, texts)))) + answer.closing

    def _equal(self, gold: Answer, given: Answer) -> bool:
        if isinstance(gold, Amounts) or isinstance(given, Amounts):
            return _parts(gold) == _parts(given) is not None
        if isinstance(gold, Named) and isinstance(given, Named):
            return self._equal_named(gold, given)
        if isinstance(gold, Named):
            return self._equal_value(gold, given)
        if isinstance(given, Named):
            return self._equal_value(given, gold, swapped=True)
        if isinstance(gold, Group) and isinstance(given, Group):
            return self._equal_groups(gold, given)
        if isinstance(gold, Scalar) and isinstance(given, Scalar):
            return self._equal_scalars(gold, given)
        group, scalar = (gold, given) if isinstance(gold, Group) else (given, gold)
        assert isinstance(group, Group)
        if len(group.items) == 1:
            return self._equal(group.items[0], scalar)
        related = _RELATION.search(group.text) or _RELATION.search(scalar.text)
        return bool(related) and self._equal_formulas(gold.text, given.text)

    def _equal_value(self, named: Named, other: Answer, *, swapped: bool = False) -> bool:
        """Return whether named values equal an answer without names; `swapped` if the other is the ground truth."""
        value, *more = named.items
        if more:
            return isinstance(other, Group) and self._all_equal(named.items, other.items)
        if isinstance(other, Scalar) and "=" in other.text:
            return self._equal_formulas(named.text, other.text)
        return self._equal(other, value) if swapped else self._equal(value, other)

    def _equal_named(self, gold: Named, given: Named) -> bool:
        if len(gold.items) == len(given.items) == 1:
            return self._equal(gold.items[0], given.items[0]) or self._equal_formulas(gold.text, given.text)
        values = dict(zip(given.names, given.items, strict=True))
        return set(gold.names) == values.keys() and all(
            self._equal(item, values[name]) for name, item in zip(gold.names, gold.items, strict=True)
        )

    def _equal_groups(self, gold: Group, given: Group) -> bool:
        if max(len(gold.items), len(given.items)) > _MAX_ITEMS:
            return False
        if gold.opening and given.opening and (gold.opening, gold.closing) != (given.opening, given.closing):
            return False
        kinds = {gold.opening, given.opening}
        if "\\{" in kinds:
            return all(any(self._equal(a, b) for b in given.items) for a in gold.items) and all(
                any(self._equal(a, b) for a in gold.items) for b in given.items
            )
        if kinds == {""}:
            return self._equal_in_any_order(gold.items, given.items)
        return kinds != {"", "["} and self._all_equal(gold.items, given.items)

    def _all_equal(self, gold: Sequence[Answer], given: Sequence[Answer]) -> bool:
        return len(gold) == len(given) and all(map(self._equal, gold, given))

    def _equal_in_any_order(self, gold: Sequence[Answer], given: Sequence[Answer]) -> bool:
        remaining = list(given)
        for expected in gold:
            found = next((i for i, answer in enumerate(remaining) if self._equal(expected, answer)), None)
            if found is None:
                return False
            del remaining[found]
        return not remaining

    def _equal_scalars(self, gold: Scalar, given: Scalar) -> bool:
        if gold.unit.contradicts(given.unit):
            return False
        if gold.is_percent != given.is_percent:  # data sets write 18% as 18% or 18 or 0.18
            percent, plain = (gold, given) if gold.is_percent else (given, gold)
            as_number = replace(percent, is_percent=False)
            hundredth = replace(as_number, text=rf"\frac{{{percent.text}}}{{100}}", literal=_hundredth(percent.literal))
            return any(
                self._equal_scalars(*((option, plain) if percent is gold else (plain, option)))
                for option in (as_number, hundredth)
            )
        if gold.literal is not None and given.literal is not None:
            return equal_literals(_in_base_unit(gold, given), _in_base_unit(given, gold))
        if _TEXT_KEY.sub("", gold.text) == _TEXT_KEY.sub("", given.text):
            return bool(gold.text)
        return self._equal_formulas(gold.text, given.text)

    def _equal_formulas(self, gold: str, given: str) -> bool:
        is_decimal = bool(_DECIMAL.search(gold) or _DECIMAL.search(given))
        try:
            for expected, answer in product(self._sympy(gold), self._sympy(given)):
                agreed = self._compare(expected, answer, is_decimal)
                if agreed or (agreed is None and self._verified(expected, answer)):
                    return True
        except TimeoutException:
            raise TimeoutError(f"math_rule: comparing took longer than timeout_s {self._timeout_s}") from None
        return False

    def _sympy(self, text: str) -> tuple[Any, ...]:
        literal = read_literal(text)
        value = None if literal is None else literal.value
        return self.parse(text) if value is None else (Rational(value.numerator, value.denominator),)

    def _verified(self, gold: Any, given: Any) -> bool:
        try:
            return verify(
                gold, given, timeout_seconds=self._timeout_s, raise_on_error=True, allow_set_relation_comp=True
            )
        except Exception:  # arbitrary, as in `_parse`; formulas that cannot be compared are different
            return False


def equal_literals(gold: Literal, given: Literal) -> bool:
    """Return whether two rational numbers are equal.

    Integers and fractions are compared exactly. If one is a decimal, it may be rounded: the difference must be at most
    `RELATIVE_TOLERANCE` of the larger number. Beside an integer, it must also be at most 1e-6.
    """
    difference = abs(gold.value - given.value)
    if not difference or not (gold.is_decimal or given.is_decimal):
        return not difference
    if (gold.is_integer or given.is_integer) and difference > RELATIVE_TOLERANCE:
        return False
    return difference <= RELATIVE_TOLERANCE * max(abs(gold.value), abs(given.value))


def _hundredth(literal: Literal | None) -> Literal | None:
    return literal and replace(literal, value=literal.value / 100, is_integer=False)


def _in_base_unit(scalar: Scalar, other: Scalar) -> Literal:
    """Return the value; if both units are known, in their base unit: 5 m equals 500 cm."""
    assert scalar.literal is not None
    if scalar.unit.measure is None or other.unit.measure is None or scalar.unit.measure == other.unit.measure:
        return scalar.literal
    return replace(scalar.literal, value=scalar.literal.value * scalar.unit.measure[1], is_integer=False)


def _parts(answer: Answer) -> tuple[object, ...] | None:
    if isinstance(answer, Amounts):
        return answer.parts
    if isinstance(answer, Scalar) and answer.literal is not None and answer.unit.measure is not None:
        kind, factor = answer.unit.measure
        return ((answer.literal.value * factor, kind),)
    return None


def _agree(gold: Any, given: Any, is_decimal: bool) -> bool | None:
    """Return whether two sympy objects have equal values, or None if values do not decide.

    Formulas with variables are compared at several points. An expression that sympy might evaluate without end equals
    only itself.
    """
    if type(gold) is type(given) and gold == given:
        return True
    if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
        return _agree_elementwise(gold, given, is_decimal)
    if isinstance(gold, MatrixBase) or isinstance(given, MatrixBase):
        return False
    try:
        check_bounded(gold)
        check_bounded(given)
    except UnboundedError:
        return False
    if not (isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr)):
        return None
    if _names(gold) != _names(given) and (gold.is_Symbol or given.is_Symbol):
        return None  # text may be parsed as a symbol or as a product of letters
    try:
        return _agree_at_points(gold, given, is_decimal)
    except TimeoutException:
        raise
    except Exception:  # sympy raises arbitrary exceptions on values it cannot compute
        return None


def _agree_elementwise(gold: Any, given: Any, is_decimal: bool) -> bool | None:
    if gold.shape != given.shape:
        return False
    results = [_agree(a, b, is_decimal) for a, b in zip(gold, given, strict=True)]
    return False if False in results else None if None in results else True


def _agree_at_points(gold: Any, given: Any, is_decimal: bool) -> bool | None:
    gold, given = (_with_exact_numbers(formula) for formula in (gold, given))
    if gold.has(I) or given.has(I) or _names(gold) | _names(given) == {"i"}:
        gold, given = (f.xreplace({s: I for s in f.free_symbols if s.name == "i"}) for f in (gold, given))
    names = sorted(_names(gold) | _names(given))
    for shift in range(_NUM_POINTS if names else 1):
        point = {name: _POINTS[(index + shift) % len(_POINTS)] + index for index, name in enumerate(names)}
        agreed = _agree_numerically(_at(gold, point), _at(given, point), is_decimal)
        if not agreed:
            return agreed
    return True


def _names(formula: Any) -> set[str]:
    return {symbol.name for symbol in formula.free_symbols}


def _with_exact_numbers(formula: Any) -> Any:
    return formula.xreplace({number: Rational(str(number)) for number in formula.atoms(Float)})


def _at(formula: Any, point: dict[str, Any]) -> Any:
    return formula.xreplace({s: point[s.name] for s in formula.free_symbols if isinstance(s, Symbol)}).doit()


def _agree_numerically(gold: Any, given: Any, is_decimal: bool) -> bool | None:
    if gold.is_Rational and given.is_Rational:
        return equal_literals(*(Literal(Fraction(int(n.p), int(n.q)), is_decimal) for n in (gold, given)))
    if gold == given:
        return None if gold in (sympy.nan, sympy.zoo) else True
    if gold.is_infinite or given.is_infinite:
        return False
    parts = [_real_and_imaginary(formula) for formula in (gold, given)]
    if None in parts:
        return None
    (a, b), (c, d) = parts  # pyright: ignore[reportGeneralTypeIssues]
    size = max(abs(a + b * I), abs(c + d * I))
    difference = abs((a - c) + (b - d) * I)
    return bool(difference <= (float(RELATIVE_TOLERANCE) if is_decimal else _EXACT_TOLERANCE) * size)


def _real_and_imaginary(formula: Any) -> tuple[Any, Any] | None:
    """Return the parts of a value; those without a significant digit are zero."""
    parts = formula.evalf(_DIGITS).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        return None
    real, imaginary = (sympy.Integer(0) if part.is_Float and part._prec == 1 else part for part in parts)
    return real, imaginary
