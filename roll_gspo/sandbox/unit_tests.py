"""Unit tests as source code (assertions, pytest functions, `check(candidate)`) for a program in another process."""

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

from roll_gspo.sandbox import rpc, tiny_pytest

_MODULE = "tests"
_MAX_REASON_CHARS = 200


def run_tests(job: Mapping[str, Any], preamble: Mapping[str, Any], descriptor: int | None) -> dict[str, Any]:
    """Run all tests.

    Args:
        job: `sources`, the source codes of the tests, and `entry_point`, the name of the function that is passed to the
            `check` of each source, or an empty string.
        preamble: names that tests can use without importing them.
        descriptor: socket to the program; None if the tests need no program.

    Returns:
        `passed`, a list of bool, and the `reason` of the first failure; or `malformed`, the reason why the tests cannot
        be run.
    """
    try:
        trees = [ast.parse(source) for source in job["sources"]]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"malformed": f"{type(error).__name__}: {error}"}
    sys.modules["pytest"] = tiny_pytest.make_module()
    names: dict[str, Any] = {}
    if descriptor is not None:
        try:
            peer = rpc.Connection(socket.socket(fileno=descriptor), untrusted_peer=True, module=_MODULE)
            received = peer.receive_names()
            names = {k: value for k, value in received.items() if k.isidentifier() and not k.startswith("__")}
        except Exception as error:  # the program ended, or sent invalid messages
            reason = f"the program did not load ({type(error).__name__})"
            return {"passed": [False] * sum(_count_tests(tree) for tree in trees), "reason": reason}
    solution = types.ModuleType("solution")
    solution.__dict__.update(names)
    sys.modules["solution"] = solution
    entry_point = str(job["entry_point"])
    used, imported = _used_names(trees)
    if descriptor is not None and not entry_point and not imported and not used & names.keys():
        # Otherwise the tests could pass with a preimported function, e.g. `factorial`.
        reason = "the program defines no name that the tests use"
        return {"passed": [False] * sum(_count_tests(tree) for tree in trees), "reason": reason}
    if entry_point or (used | imported) & names.keys() - preamble.keys():
        # Otherwise the program could replace `abs`, `all` or `isclose` in the tests.
        names = {name: value for name, value in names.items() if name not in preamble}
    solution.__dict__["__all__"] = list(names)
    passed: list[bool] = []
    reasons: list[str] = []
    for tree in trees:
        scope = {**preamble, **names, "__name__": _MODULE}
        try:
            failures = _run_source(tree, scope, solution, entry_point)
        except tiny_pytest.UnsupportedError as error:
            return {"malformed": str(error)}
        missing = max(0, _count_tests(tree) - len(failures))
        reasons += [failure for failure in failures if failure]
        passed += [not failure for failure in failures] + [False] * missing
    return {"passed": passed, "reason": reasons[0] if reasons else ""}


def _used_names(trees: Sequence[ast.Module]) -> tuple[set[str], set[str]]:
    """Return the names that tests use without defining them or mention in a string, and those that they import."""
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


def _count_tests(tree: ast.Module) -> int:
    return max(1, sum(_is_test(node) for node in ast.walk(tree)))


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")


def _run_source(tree: ast.Module, scope: dict[str, Any], solution: types.ModuleType, entry_point: str) -> list[str]:
    """Run the tests of one source, and return the reason of each failure, or an empty string for a passed test."""
    reason = _failure(lambda: exec(compile(tree, "tests.py", "exec"), scope))
    if reason:
        return [reason]
    if entry_point:
        if not inspect.isfunction(scope.get("check")):
            raise tiny_pytest.UnsupportedError("the tests define no function check(candidate)")
        return [_failure(lambda: scope["check"](vars(solution)[entry_point]))]
    tests = list(_collect(scope))
    if not tests:
        return [""]  # a source without test functions passes if it runs
    return [_failure(lambda test=test: _call(test, scope)) for test in tests]


def _collect(scope: dict[str, Any]) -> Iterator[tiny_pytest.Test]:
    for name, value in list(scope.items()):
        if inspect.isfunction(value) and name.startswith("test") and value.__module__ == _MODULE:
            yield from tiny_pytest.parametrized(value)
        elif inspect.isclass(value) and name.startswith("Test") and value.__module__ == _MODULE:
            for attribute, method in list(vars(value).items()):
                if inspect.isfunction(method) and attribute.startswith("test"):
                    yield from tiny_pytest.parametrized(method, value)


def _call(test: tiny_pytest.Test, scope: dict[str, Any]) -> None:
    with tiny_pytest.with_fixtures(test, scope) as call:
        result = call()
        if inspect.iscoroutine(result):
            asyncio.run(result)


def _failure(action: Any) -> str:
    """Run an action, and return the exception as text, or an empty string."""
    try:
        action()
    except tiny_pytest.UnsupportedError:
        raise
    except tiny_pytest.Skipped:
        return ""
    except BaseException as error:  # including SystemExit, which the program can raise in this process
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:
            text = type(error).__name__
        return text[:_MAX_REASON_CHARS]
    return ""
