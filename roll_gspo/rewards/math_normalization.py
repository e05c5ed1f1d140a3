r"""Normalization of answers: cleaning the content of a `\boxed{}`, and one notation for parsed formulas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
from sympy import Add, Equality, Float, Mul, Number, NumberSymbol, Pow, Rational, Symbol, Tuple
from sympy.core.expr import UnevaluatedExpr
from sympy.core.numbers import ImaginaryUnit
from sympy.logic.boolalg import BooleanAtom
from sympy.matrices import ImmutableDenseMatrix, MatrixBase
from sympy.sets import FiniteSet, Interval, Union

_SPACE = r"(?:\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s)"
_AROUND = re.compile(rf"^(?:{_SPACE}|\\displaystyle(?![A-Za-z]))+|{_SPACE}*\.?{_SPACE}*$")
_STYLED = re.compile(r"^\\(?:mathbf|boldsymbol|bm|mathit)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}$")
_CURRENCY = re.compile(r"^[€£¥₹]\s*(?=[\d.])|(?<=\d)\s*[€£¥₹]$")
_NAMED = re.compile(r"^(?:[A-Za-z]|\\[A-Za-z]+|\\text\{[^{}]*\})(?:_\{?\w+\}?|\([A-Za-z]\))?\s*=(?!=)\s*([^=<>]+)$")
_PERCENT = re.compile(r"^([^%]*[\d}])\s*\\?%$")

# Types that `canonical_text` may evaluate, because they cannot take long.
_CHEAP_TYPES = (
    *(Add, Mul, Pow, Number, NumberSymbol, ImaginaryUnit, Symbol, UnevaluatedExpr),
    *(Tuple, FiniteSet, Interval, Union, BooleanAtom),
)
_MAX_NODES = 100
_MAX_EXPONENT = 8


def candidate_answers(formula: str) -> list[str]:
    r"""Return possible interpretations of a box's content as input for math-verify, the most literal one first.

    Spacing, a final full stop, bold type and currency signs are removed. `x = 5` may also mean 5. A percent sign is
    moved to where math-verify expects it. Then `18\%` equals both 18 and 0.18, because datasets use all three forms.
    """
    text = _AROUND.sub("", formula)
    while styled := _STYLED.match(text):
        text = _AROUND.sub("", styled[1])
    text = _CURRENCY.sub("", text)
    if percent := _PERCENT.match(text):
        return [f"${percent[1]}$%"]
    named = _NAMED.match(text)
    return [f"\\boxed{{{candidate}}}" for candidate in (text, *([named[1]] if named else []))]


def canonical_text(formulas: Sequence[Any]) -> str | None:
    r"""Return one notation for a parsed answer, for majority votes: `1/2` for `0.5`, `\frac{3}{6}` and `x = 1/2`.

    Numbers are exact, products are expanded, and sets are sorted. Other formulas (long ones, high powers, functions)
    are not changed. Equal formulas may therefore have different texts, but equal texts always mean equal formulas.

    Args:
        formulas: result of math-verify's `parse`. The first sympy object is used, else the first string.

    Returns:
        The text, or None if `formulas` is empty.
    """
    if not formulas:
        return None
    formula = next((f for f in formulas if not isinstance(f, str)), formulas[0])
    if isinstance(formula, MatrixBase):
        return str(ImmutableDenseMatrix(formula).applyfunc(_expand))
    if isinstance(formula, Equality) and isinstance(formula.lhs, Symbol):
        formula = formula.rhs
    return str(_expand(formula)) if isinstance(formula, sympy.Basic) else " ".join(str(formula).split())


def _expand(formula: Any) -> Any:
    if not _is_cheap(formula):
        return formula
    exact = formula.xreplace({number: Rational(str(number)) for number in formula.atoms(Float)})
    try:
        return sympy.expand(exact.doit())
    except Exception:  # sympy raises arbitrary exceptions on incompatible operands, e.g. sets of strings
        return formula


def _is_cheap(formula: Any) -> bool:
    for count, node in enumerate(sympy.preorder_traversal(formula)):
        if count > _MAX_NODES or not isinstance(node, _CHEAP_TYPES):
            return False
        if isinstance(node, Pow) and not (node.exp.is_Rational and abs(node.exp) <= _MAX_EXPONENT):
            return False
    return True
