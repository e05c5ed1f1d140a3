r"""Bounds on the cost of a formula: which texts are parsed, and which expressions are evaluated.

The parser takes seconds on deep brackets and on chains of powers, and sympy evaluates `9^{9^{9}}` until the memory is
full. A policy finds such answers, so they are refused before any work is done.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy import Add, Integer, Mul, Number, NumberSymbol, Pow, Product, Rational, Sum, Symbol
from sympy.core.expr import UnevaluatedExpr
from sympy.core.numbers import ImaginaryUnit

MAX_CHARS = 600
_MAX_TOKENS = 110
_MAX_BRACKETS = 3
_MAX_BRACES = 8
_MAX_SCRIPTS = 2
_MAX_RELATIONS = 6
_MAX_FUNCTIONS = 10
_MAX_BARS = 8
_MAX_SUMS = 1
_MAX_UNIONS = 8
_MAX_NODES = 200
_MAX_BITS = 20_000
_MAX_BITS_OF_ARGUMENT = 2_000
_MAX_TERMS = 200

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S", re.DOTALL)
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|leq|geq|ne|neq|lt|gt|in|approx)(?![A-Za-z])")
_SUM = re.compile(r"\\(?:sum|prod)(?![A-Za-z])")
_BAR = re.compile(r"\||\\[lr]?vert(?![A-Za-z])")
_FUNCTION = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|lg|exp|det|gcd|max|min)(?![A-Za-z])")
_UNION = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
# Three exponents or indices on one another, or a factorial of a factorial.
_CHAIN = re.compile(r"(?:[\^_] ?(?:\\[A-Za-z]+|\{[^{}]*\}|[^\s{]) ?){2}[\^_]|! ?!")
# What sympy cannot evaluate in bounded time.
_ANALYSIS = re.compile(
    r"\\(?:i{1,3}nt|oint|lim(?:sup|inf)?)(?![A-Za-z])|\\[dt]?frac ?\{ ?(?:\\partial|\\mathrm ?\{d\}|d) ?\}"
)
_LARGE_COMBINATION = re.compile(r"\\[dt]?binom|\\choose|[CP]_|_\{?\d+\}? ?[CP]")
_OPENING = ("(", "[", "\\{", "\\lbrace", "\\langle", "\\lfloor", "\\lceil", "\\lvert", "\\begin")
_CLOSING = (")", "]", "\\}", "\\rbrace", "\\rangle", "\\rfloor", "\\rceil", "\\rvert", "\\end")


class UnboundedError(Exception):
    """The expression is too large to evaluate."""


def may_parse(text: str) -> bool:
    """Return whether the parser is quick on a normalized text. The check is linear in the text.

    It limits characters, tokens, the depth of brackets, braces and exponents, and the number of relations, sums,
    unions, functions and bars. Integrals, limits and derivatives are refused. Final answers are far
    below these limits.
    """
    if len(text) > MAX_CHARS:
        return False
    tokens = _TOKEN.findall(text)
    if len(tokens) > _MAX_TOKENS or _CHAIN.search(text) or _ANALYSIS.search(text):
        return False
    limits = (
        (_RELATION, _MAX_RELATIONS),
        (_SUM, _MAX_SUMS),
        (_UNION, _MAX_UNIONS),
        (_FUNCTION, _MAX_FUNCTIONS),
        (_BAR, _MAX_BARS),
    )
    if any(len(pattern.findall(text)) > limit for pattern, limit in limits):
        return False
    if _LARGE_COMBINATION.search(text) and re.search(r"\d{5}", text):
        return False
    return _is_shallow(tokens)


def _is_shallow(tokens: list[str]) -> bool:
    brackets = braces = scripts = 0
    opened: list[bool] = []  # for each open brace, whether it is an exponent or an index
    for previous, token in zip(["", *tokens], tokens, strict=False):
        if token == "{":
            opened.append(previous in "^_" and bool(previous))
            braces += 1
            scripts += opened[-1]
        elif token == "}":
            if not opened:
                return False
            braces -= 1
            scripts -= opened.pop()
        elif token in _OPENING:
            brackets += 1
        elif token in _CLOSING:
            brackets -= 1
        if brackets > _MAX_BRACKETS or braces > _MAX_BRACES or scripts > _MAX_SCRIPTS:
            return False
    return not opened


def check_bounded(expression: Any) -> None:
    """Check that sympy can evaluate an expression quickly.

    Raises:
        UnboundedError: it has too many nodes, an integral, limit or derivative, or a value of too many bits.
    """
    for count, _ in enumerate(sympy.preorder_traversal(expression)):
        if count > _MAX_NODES:
            raise UnboundedError
    _bits(expression)


def _bits(node: Any) -> float:
    """Return an upper bound of the number of bits of a value, and of the integers that its evaluation needs."""
    if isinstance(node, Rational):
        bits = float(max(abs(int(node.p)).bit_length(), int(node.q).bit_length()))
    elif isinstance(node, Number | NumberSymbol | Symbol | ImaginaryUnit) or not node.args:
        bits = 64.0
    elif isinstance(node, Add):
        bits = sum(map(_bits, node.args)) + len(node.args)
    elif isinstance(node, Mul | UnevaluatedExpr | sympy.Tuple):
        bits = sum(map(_bits, node.args))
    elif isinstance(node, Pow):
        bits = _bits_of_power(*node.args)
    elif isinstance(node, Sum | Product):
        bits = _bits_of_sum(node)
    elif isinstance(node, sympy.Integral | sympy.Derivative | sympy.Limit):
        raise UnboundedError
    elif isinstance(node, sympy.factorial | sympy.gamma | sympy.binomial):
        largest = _largest(node.args[0])
        bits = largest * max(1.0, float(largest).__ceil__().bit_length())
        sum(map(_bits, node.args))
    else:
        inner = [_bits(argument) for argument in node.args]
        if max(inner) > _MAX_BITS_OF_ARGUMENT:
            raise UnboundedError
        bits = 1.5 * _largest(node.args[0]) if isinstance(node, sympy.exp) else 64.0 + max(inner)
    if bits > _MAX_BITS:
        raise UnboundedError
    return bits


def _bits_of_power(base: Any, exponent: Any) -> float:
    bits = max(1.0, _bits(base))
    if exponent.is_Rational and not exponent.is_Integer and bits > _MAX_BITS_OF_ARGUMENT:
        raise UnboundedError
    _bits(exponent)
    return bits * max(1.0, _largest(exponent))


def _largest(node: Any) -> float:
    """Return an upper bound of the absolute value of a small expression; a symbol is a small number."""
    if node.is_Number:
        return abs(float(node)) if node.is_finite else 64.0
    if not node.is_number:
        return 8.0
    bits = _bits(node)
    if bits > 256:
        raise UnboundedError
    return float(abs(node.evalf(15, maxn=30))) if bits < 64 else 2.0 ** min(bits, 500)


def _bits_of_sum(node: Any) -> float:
    (_, start, end), *others = node.limits
    if others or node.function.has(Sum, Product) or not (isinstance(start, Integer) and isinstance(end, Integer)):
        raise UnboundedError
    terms = int(end) - int(start) + 1
    if terms > _MAX_TERMS:
        raise UnboundedError
    return max(1, terms) * _bits(node.function)
