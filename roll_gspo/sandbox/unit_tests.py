"""Unit tests as source code (assertions, pytest functions, `check(candidate)`) for a program in another process.

A test passes if it ends normally, has executed an assertion (if it contains any), and has asked the program's objects
nothing that is refused; see `program_objects`. Skipped tests have not passed.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import socket
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from roll_gspo.sandbox import assertions, free_names
from roll_gspo.sandbox.program_objects import TestsEnd

_MAX_REASON_CHARS = 200
_PLUGINS = (
    *("cacheprovider", "doctest", "faulthandler", "junitxml", "logging", "pastebin", "setuponly"),
    *("setupplan", "stepwise", "terminal", "threadexception", "unraisableexception", "warnings"),
)
_ARGUMENTS = (
    "-c",
    os.devnull,
    "--rootdir=.",
    "--confcutdir=.",
    "--assert=plain",
    "-s",
    *(f"-pno:{n}" for n in _PLUGINS),
)


class MalformedTestsError(Exception):
    """The tests cannot run with any program."""


class _Source:
    """One source of tests, and the module in which it runs."""

    def __init__(self, tree: ast.Module, number: int, counter: _Counter) -> None:
        self.asserting = assertions.asserting_functions(tree)
        self.tests = [function.name for function in _test_functions(tree)]
        self.num_tests = max(1, len(self.tests))
        self.has_to_assert = assertions.asserts(tree.body, self.asserting)
        self.path = Path(f"test_{number}.py").absolute()
        self.module = types.ModuleType("tests" if self.tests else "__main__")  # so that `__main__` guards run
        self.functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        self._code = compile(assertions.count_assertions(tree), "tests.py", "exec")
        vars(self.module)[assertions.COUNTER] = counter.add

    def execute(self, scope: Mapping[str, Any]) -> None:
        """Run the code of the module."""
        vars(self.module).update(scope)
        sys.modules[self.module.__name__] = self.module
        exec(self._code, vars(self.module))


class _Counter:
    """Number of assertions that have been executed, and of refusals by the connection."""

    def __init__(self) -> None:
        self._count = self._refusals = 0
        self.connection: TestsEnd | None = None

    def add(self) -> None:
        """Count an assertion."""
        self._count += 1

    def start(self) -> None:
        """Start a test."""
        self._count, self._refusals = 0, self.connection.refusals if self.connection else 0

    def check(self, has_to_assert: bool) -> None:
        """Raise AssertionError if the test does not count as passed."""
        if self.connection and self.connection.refusals > self._refusals:
            raise AssertionError("the tests used an object of the program like data")
        if has_to_assert and not self._count:
            raise AssertionError("the test has executed no assertion")


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
    counter = _Counter()
    try:
        trees = [ast.parse(source) for source in job["sources"]]
        names = free_names.find_names(job["sources"], trees, preamble)
        missing = free_names.missing_imports(trees)
        sources = [_Source(tree, number, counter) for number, tree in enumerate(trees)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"malformed": f"{type(error).__name__}: {error}"}
    try:
        if missing:
            raise MalformedTestsError(f"the tests import {missing[0]}, which is not installed in the sandbox")
        results = _run(sources, names, preamble, descriptor, str(job["entry_point"]), counter)
    except MalformedTestsError as error:
        return {"malformed": str(error)}
    reasons = [reason for passed, reason in results if not passed]
    return {"passed": [passed for passed, _ in results], "reason": reasons[0] if reasons else ""}


def _run(
    sources: Sequence[_Source],
    names: free_names.FreeNames,
    preamble: Mapping[str, Any],
    descriptor: int | None,
    entry_point: str,
    counter: _Counter,
) -> list[tuple[bool, str]]:
    defined: dict[str, Any] = {}
    num_tests = sum(source.num_tests for source in sources)
    if descriptor is not None:
        try:
            counter.connection = TestsEnd(socket.socket(fileno=descriptor), names.classes)
            defined = counter.connection.receive_names()
        except BaseException as error:  # the program ended, or sent invalid messages
            return [(False, f"the program did not load ({type(error).__name__})")] * num_tests
        needed = {entry_point} if entry_point else names.own | names.imported | names.mentioned
        if not needed & defined.keys():
            return [(False, "the program defines no name that the tests use")] * num_tests
    entering = {name: value for name, value in defined.items() if name in names.own | names.mentioned}
    solution = types.ModuleType(free_names.SOLUTION)
    vars(solution).update(defined, __all__=list(entering))
    sys.modules[free_names.SOLUTION] = solution
    scope = {**preamble, **names.modules, **entering}
    results: list[tuple[bool, str]] = []
    collected: list[_Source] = []
    for source in sources:
        if entry_point and "check" not in source.functions:
            raise MalformedTestsError("the tests define no function check(candidate)")
        if not entry_point and not source.tests and source.asserting and not source.has_to_assert:
            raise MalformedTestsError("the tests never call the functions with their assertions")
        counter.start()
        result = _result(lambda source=source: source.execute(scope))
        if not result[0]:
            results += [result] * source.num_tests
        elif entry_point:
            call = lambda source=source: vars(source.module)["check"](defined[entry_point])  # noqa: E731
            results.append(_result(call, counter, bool(source.asserting & {"check"})))
        elif source.tests:
            collected.append(source)
        else:
            results.append(_result(lambda: None, counter, source.has_to_assert))
    return results + (_Session(collected, counter).run() if collected else [])


def _result(
    action: Callable[[], Any], counter: _Counter | None = None, has_to_assert: bool = False
) -> tuple[bool, str]:
    """Run an action, and return whether it succeeds, and the reason if it does not."""
    try:
        action()
        if counter:
            counter.check(has_to_assert)
    except BaseException as error:  # including SystemExit, which the program can raise in this process
        return False, _describe(error)
    return True, ""


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
    except BaseException:  # the text of an exception of the program
        return type(error).__name__


def _test_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods that pytest collects."""
    for node in tree.body:
        is_class = isinstance(node, ast.ClassDef)
        if is_class and (node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)):
            inner: Sequence[ast.stmt] = node.body
        else:
            inner = [node]
        for function in inner:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name.startswith("test"):
                yield function


class _Session:
    """A run of pytest on modules that have been executed; it is a plugin of pytest, too."""

    def __init__(self, sources: Sequence[_Source], counter: _Counter) -> None:
        self._sources = {source.path: source for source in sources}
        self._counter = counter
        self._results: dict[str, tuple[bool, str]] = {}
        self._malformed = self._failed = ""

    def run(self) -> list[tuple[bool, str]]:
        """Run the tests."""
        for path in self._sources:
            path.touch()
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        pytest.main([*_ARGUMENTS, *map(str, self._sources)], plugins=[self])
        if self._malformed:
            raise MalformedTestsError(self._malformed)
        missing = sum(source.num_tests for source in self._sources.values()) if self._failed else 0
        return list(self._results.values()) + [(False, self._failed)] * missing

    def pytest_pycollect_makemodule(self, module_path: Path, parent: Any) -> Any:
        """Use the executed module instead of importing the file."""
        module = pytest.Module.from_parent(parent, path=module_path)
        module.obj = self._sources[module_path].module
        return module

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out tests that are always skipped or expected to fail; all others have failed until they pass."""
        items[:] = [item for item in items if not _is_left_out(item)]
        if not items and not self._failed:
            self._malformed = "pytest collects no tests, or all are marked as skipped"
        self._results = dict.fromkeys((item.nodeid for item in items), (False, "the test did not run"))

    def pytest_collectreport(self, report: Any) -> None:
        """Record that tests cannot be collected, e.g. because the program returned wrong parameters."""
        if report.failed:
            self._failed = str(report.longrepr)[-_MAX_REASON_CHARS:]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Count the assertions of a test, including those of its fixtures."""
        self._counter.start()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        """Run a test, which has to execute an assertion if it contains one."""
        result = yield
        source = self._sources[item.path]
        self._counter.check(item.name.partition("[")[0] in source.asserting)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: Any) -> bool | None:
        """Run asynchronous tests without a plugin."""
        if not inspect.iscoroutinefunction(pyfuncitem.obj):
            return None
        names = inspect.signature(pyfuncitem.obj).parameters
        asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the result of a test."""
        if report.when == "call" and report.passed:
            self._results[report.nodeid] = (True, "")
        elif not report.passed:
            self._results[report.nodeid] = (False, "")

    def pytest_exception_interact(self, call: Any, report: Any) -> None:
        """Record the reason of a failure."""
        error = call.excinfo.value
        if isinstance(error, pytest.FixtureLookupError):
            self._malformed = f"the tests use the fixture {error.argname}, which does not exist"
        if report.nodeid in self._results:
            self._results[report.nodeid] = (False, _describe(error))


def _is_left_out(item: Any) -> bool:
    """Return whether a mark of the tests says that a test is never run, or expected to fail.

    pytest also adds such a mark if there are no parameters, which may come from the program.
    """
    skip = item.get_closest_marker("skip")
    is_empty = skip and str(skip.kwargs.get("reason")).startswith("got empty parameter set")
    return bool(skip and not is_empty) or item.get_closest_marker("xfail") is not None


def warm_up() -> None:
    """Load all modules of pytest, so that each test process shares them."""
    previous = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run_tests({"sources": ["def test_it(): assert True"], "entry_point": ""}, {}, None)
        os.chdir(previous)
    for name in ("tests", free_names.SOLUTION):
        del sys.modules[name]
