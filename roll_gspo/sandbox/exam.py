"""Unit tests as code (assertions, pytest functions, `check(candidate)`), run on a program in another process."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import socket
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roll_gspo.sandbox import peer, tiny_pytest

_MODULE = "tests"
_MAX_REASON = 200


def run(job: Mapping[str, Any], preamble: Mapping[str, Any], descriptor: int | None) -> dict[str, Any]:
    """Run all tests.

    Args:
        job: `sources` of the tests; `entry_point`, the function that each source's `check` is given, or "".
        preamble: names that tests may take for granted.
        descriptor: socket to the program, None where the tests need none.

    Returns:
        `passed`: whether, for each case, or `malformed`: why the tests themselves cannot be run.
    """
    try:
        trees = [ast.parse(source) for source in job["sources"]]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"malformed": f"{type(error).__name__}: {error}"}
    sys.modules["pytest"] = tiny_pytest.module()
    names: dict[str, Any] = {}
    if descriptor is not None:
        try:
            said = peer.Connection(socket.socket(fileno=descriptor), guards=True, module=_MODULE).names()
            names = {name: value for name, value in said.items() if name.isidentifier() and not name.startswith("__")}
        except Exception as error:  # the program ended, or says nonsense
            reason = f"the program did not load ({type(error).__name__})"
            return {"passed": [False] * sum(_count(tree) for tree in trees), "reason": reason}
    solution = types.ModuleType("solution")
    solution.__dict__.update(names)
    sys.modules["solution"] = solution
    entry_point = str(job["entry_point"])
    used, imported = _used(trees)
    if descriptor is not None and not entry_point and not imported and not used & names.keys():
        reason = "the program defines nothing that the tests use"  # they would examine Python's own `factorial`
        return {"passed": [False] * sum(_count(tree) for tree in trees), "reason": reason}
    if entry_point or (used | imported) & names.keys() - preamble.keys():
        # Were these the program's, its `abs`, `all` or `isclose` would decide what the tests find.
        names = {name: value for name, value in names.items() if name not in preamble}
    solution.__dict__["__all__"] = list(names)
    passed: list[bool] = []
    reasons: list[str] = []
    for tree in trees:
        space = {**preamble, **names, "__name__": _MODULE}
        try:
            outcomes = _cases(tree, space, solution, entry_point)
        except tiny_pytest.UnsupportedError as error:
            return {"malformed": str(error)}
        missing = max(0, _count(tree) - len(outcomes))
        reasons += [reason for reason in outcomes if reason]
        passed += [not reason for reason in outcomes] + [False] * missing
    return {"passed": passed, "reason": reasons[0] if reasons else ""}


def _used(trees: Sequence[ast.Module]) -> tuple[set[str], set[str]]:
    """Names that the tests use without defining them (or mention in a text), and those that they import by name."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    bound = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    loaded = {node.id for node in nodes if isinstance(node, ast.Name)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {
        alias.name
        for node in imports
        for alias in node.names
        if alias.name == "solution" or (isinstance(node, ast.ImportFrom) and node.module == "solution")
    }
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return (loaded - bound) | (words - bound), imported - {"*"}


def _count(tree: ast.Module) -> int:
    return max(1, sum(_is_test(node) for node in ast.walk(tree)))


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")


def _cases(tree: ast.Module, space: dict[str, Any], solution: types.ModuleType, entry_point: str) -> list[str]:
    """Why each case failed, "" where it passed."""
    reason = _why_failed(lambda: exec(compile(tree, "tests.py", "exec"), space))
    if reason:
        return [reason]
    if entry_point:
        if not inspect.isfunction(space.get("check")):
            raise tiny_pytest.UnsupportedError("they define no function check(candidate)")
        return [_why_failed(lambda: space["check"](vars(solution)[entry_point]))]
    tests = list(_tests(space))
    if not tests:
        return [""]  # to execute it was the test
    return [_why_failed(lambda test=test: _call(test, space)) for test in tests]


def _tests(space: dict[str, Any]) -> Iterator[tiny_pytest.Test]:
    for name, value in list(space.items()):
        if inspect.isfunction(value) and name.startswith("test") and value.__module__ == _MODULE:
            yield from tiny_pytest.variants(value)
        elif inspect.isclass(value) and name.startswith("Test") and value.__module__ == _MODULE:
            for attribute, method in list(vars(value).items()):
                if inspect.isfunction(method) and attribute.startswith("test"):
                    yield from tiny_pytest.variants(method, value)


def _call(test: tiny_pytest.Test, space: dict[str, Any]) -> None:
    with tiny_pytest.prepared(test, space) as call:
        result = call()
        if inspect.iscoroutine(result):
            asyncio.run(result)


def _why_failed(action: Any) -> str:
    try:
        action()
    except tiny_pytest.UnsupportedError:
        raise
    except tiny_pytest.Skipped:
        return ""
    except BaseException as error:  # also SystemExit, which the program can raise over here
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:
            text = type(error).__name__
        return text[:_MAX_REASON]
    return ""
