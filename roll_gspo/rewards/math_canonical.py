"""One notation for parsed formulas, for majority votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
from sympy import Add, Equality, Float, Mul, Number, NumberSymbol, Pow, Rational, Symbol, Tuple
from sympy.core.expr import UnevaluatedExpr
from sympy.core.numbers import ImaginaryUnit
from sympy.logic.boolalg import BooleanAtom
from sympy.matrices import MatrixBase
from sympy.sets import FiniteSet, Interval, Union

# Types that `canonical_text` may evaluate, because they cannot take long.
_CHEAP_TYPES = (
    *(Add, Mul, Pow, Number, NumberSymbol, ImaginaryUnit, Symbol, UnevaluatedExpr),
    *(Tuple, FiniteSet, Interval, Union, BooleanAtom),
)
_MAX_NODES = 100
_MAX_EXPONENT = 8
_MAX_TERMS = 500


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
        return str(formula.applyfunc(_expand))
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
    return _max_terms(formula) <= _MAX_TERMS


def _max_terms(formula: Any) -> int:
    """Return an upper bound of the number of terms of an expanded formula."""
    terms = [_max_terms(argument) for argument in formula.args]
    if isinstance(formula, Mul):
        return math.prod(terms)
    if isinstance(formula, Pow):
        return terms[0] ** max(1, math.ceil(abs(formula.exp)))
    return max(1, sum(terms))
