"""Counting of executed assertions in unit tests, so that a test that asserts nothing does not pass.

A program can end a loop before its first assertion, or return a value for which the tests skip it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

COUNTER = "@assertion"  # no identifier, so that no code can use this name
_EXPECTING = ("raises", "warns", "assertRaises", "assertRaisesRegex", "assertWarns", "assertWarnsRegex", "assertLogs")
_FAILING = ("fail", "exit", "_exit")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _CountAssertions(ast.NodeTransformer):
    """Add a call of the counter behind every statement that asserts something."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and any(isinstance(item, ast.stmt) for item in value):
                setattr(node, field, [new for item in value for new in _counted(item)])
        return node


def _counted(statement: ast.AST) -> list[ast.AST]:
    if not is_assertion(statement):
        return [statement]
    call = ast.Expr(ast.Call(ast.Name(COUNTER, ast.Load()), [], []))
    return [statement, ast.fix_missing_locations(ast.copy_location(call, statement))]


def count_assertions(tree: ast.Module) -> ast.Module:
    """Change a syntax tree so that it calls the global name `COUNTER` after each assertion."""
    return _CountAssertions().visit(tree)


def is_assertion(node: ast.AST) -> bool:
    """Return whether a statement asserts something and does not always fail."""
    if isinstance(node, ast.Assert):
        return not (isinstance(node.test, ast.Constant) and not node.test.value)
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(_called_name(item.context_expr) in _EXPECTING for item in node.items)
    return isinstance(node, ast.Expr) and _called_name(node.value).startswith(("assert", "raises", "warns"))


def _called_name(node: ast.AST) -> str:
    if isinstance(node, ast.Await):
        node = node.value
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def asserting_functions(tree: ast.Module) -> set[str]:
    """Return the names of functions that contain assertions or call functions that do."""
    functions = [node for node in ast.walk(tree) if isinstance(node, _Function)]
    found = {function.name for function in functions if asserts(function.body, ())}
    while True:
        more = {function.name for function in functions if asserts(function.body, found)}
        if more <= found:
            return found
        found |= more


def asserts(body: Sequence[ast.stmt], asserting: Iterable[str]) -> bool:
    """Return whether code has to execute an assertion, or to call one of the functions `asserting`.

    Code that may raise an exception instead does not have to: `try: assert f(0) is None; except ValueError: pass`.
    """
    return any(_asserts(node, asserting) for node in body)


def _asserts(node: ast.AST, asserting: Iterable[str]) -> bool:
    if is_assertion(node) or _called_name(node) in asserting:
        return True
    if isinstance(node, _Function | ast.ClassDef):
        return False
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Try) and any(not _fails(handler.body) for handler in node.handlers):
        children = [*node.orelse, *node.finalbody]
    return any(_asserts(child, asserting) for child in children)


def _fails(body: Sequence[ast.stmt]) -> bool:
    """Return whether code contains a statement that fails a test."""
    nodes = [inner for node in body for inner in ast.walk(node)]
    always = (isinstance(node, ast.Assert) and not is_assertion(node) for node in nodes)
    return any(always) or any(isinstance(node, ast.Raise) or _called_name(node) in _FAILING for node in nodes)
