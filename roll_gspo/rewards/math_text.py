r"""The text around a formula: what may be read out of a `\boxed{}`, and one notation for what was read."""

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

# What `canonical_text` may evaluate: nothing that could run for long.
_PLAIN = (
    *(Add, Mul, Pow, Number, NumberSymbol, ImaginaryUnit, Symbol, UnevaluatedExpr),
    *(Tuple, FiniteSet, Interval, Union, BooleanAtom),
)
_MAX_NODES = 100
_MAX_EXPONENT = 8


def readings(formula: str) -> list[str]:
    r"""What the text of a box may mean, as texts for math-verify, the most literal first.

    Spacing, a final full stop, bold type and currency signs are taken off. `x = 5` may mean 5. A percent sign is put
    where math-verify looks for it: it lets `18\%` equal 18 and 0.18, since data sets write all three.
    """
    text = _AROUND.sub("", formula)
    while styled := _STYLED.match(text):
        text = _AROUND.sub("", styled[1])
    text = _CURRENCY.sub("", text)
    if percent := _PERCENT.match(text):
        return [f"${percent[1]}$%"]
    named = _NAMED.match(text)
    return [f"\\boxed{{{meant}}}" for meant in (text, *([named[1]] if named else []))]


def canonical_text(formulas: Sequence[Any]) -> str | None:
    r"""One notation for a parsed answer, for counting votes: `1/2` for `0.5`, `\frac{3}{6}` and `x = 1/2`.

    Numbers are exact, sums of products are multiplied out, sets are sorted. Formulas beyond that (long ones, high
    powers, functions) stay as they were written: two texts may mean the same, one text never means two things.

    Args:
        formulas: what math-verify parsed; the first sympy object counts, else the first text.
    """
    if not formulas:
        return None
    formula = next((f for f in formulas if not isinstance(f, str)), formulas[0])
    if isinstance(formula, MatrixBase):
        return str(ImmutableDenseMatrix(formula).applyfunc(_evaluated))
    if isinstance(formula, Equality) and isinstance(formula.lhs, Symbol):
        formula = formula.rhs
    return str(_evaluated(formula)) if isinstance(formula, sympy.Basic) else " ".join(str(formula).split())


def _evaluated(formula: Any) -> Any:
    if not _is_harmless(formula):
        return formula
    exact = formula.xreplace({number: Rational(str(number)) for number in formula.atoms(Float)})
    try:
        return sympy.expand(exact.doit())
    except Exception:  # sympy raises anything on what does not fit together, e.g. sets of texts
        return formula


def _is_harmless(formula: Any) -> bool:
    for count, node in enumerate(sympy.preorder_traversal(formula)):
        if count > _MAX_NODES or not isinstance(node, _PLAIN):
            return False
        if isinstance(node, Pow) and not (node.exp.is_Rational and abs(node.exp) <= _MAX_EXPONENT):
            return False
    return True
