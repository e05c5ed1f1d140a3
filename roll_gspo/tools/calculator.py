"""`calculator`: arithmetic expressions, evaluated without Python's `eval` and bounded in size."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from roll_gspo.tools.tool import ToolError

_MAX_CHARS, _MAX_DEPTH, _MAX_BITS, _MAX_COUNT = 300, 50, 4000, 1000
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: vars(math)[name] for name in ("sqrt", "exp", "log", "log2", "log10", "floor", "ceil", "gcd", "lcm")},
    **{name: vars(math)[name] for name in ("sin", "cos", "tan", "asin", "acos", "atan", "hypot", "degrees", "radians")},
    **{"abs": abs, "min": min, "max": max, "round": round},
    **{name: vars(math)[name] for name in ("factorial", "comb")},
}
_WRITTEN = {"×": "*", "÷": "/", "−": "-", "^": "**"}
_COUNTING = ("factorial", "comb")
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: numbers, parentheses, the operators + - * / // % ^, and functions such as sqrt, log, sin, min and
            round, e.g. (3 + 4.5) * 2^10
    """
    if len(expression) > _MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; at most {_MAX_CHARS} are allowed")
    text = expression.strip()
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError(f"'{expression}' is no arithmetic expression") from None
    try:
        value = _value(tree.body, 0)
    except (OverflowError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ToolError(str(error)) from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.AST, depth: int) -> int | float:
    """Evaluate a node. Every intermediate value is bounded before it is computed."""
    if depth > _MAX_DEPTH:
        raise ToolError("the expression is nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, depth + 1))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, [_value(argument, depth + 1) for argument in node.args])
    raise ToolError("the expression has something else than numbers, + - * / // % ^, parentheses and functions")


def _power(base: int | float, exponent: int | float) -> int | float:
    are_integers = isinstance(base, int) and isinstance(exponent, int)
    if are_integers and abs(base) > 1 and int(base).bit_length() * abs(exponent) > _MAX_BITS:
        raise ToolError(f"{_short(base)}^{_short(exponent)} is too large")
    return _bounded(base**exponent)


def _called(name: str, arguments: list[int | float]) -> int | float:
    if name not in _FUNCTIONS:
        raise ToolError(f"there is no function '{name}'; known: {', '.join(_FUNCTIONS)}")
    counts = arguments if name in _COUNTING else arguments[1:] if name == "round" else ()
    if any(abs(count) > _MAX_COUNT for count in counts):
        raise ToolError(f"{name} takes numbers up to {_MAX_COUNT}")
    return _bounded(_FUNCTIONS[name](*arguments))


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ToolError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ToolError("a number has too many digits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("the result is not finite")
    return value


def _short(number: int | float) -> str:
    text = str(number)
    return text if len(text) <= 20 else f"{text[:20]}..."
