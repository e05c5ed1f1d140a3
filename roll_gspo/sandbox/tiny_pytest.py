"""Subset of pytest for generated unit tests, because importing pytest would take longer than the tests.

It supports `raises`, `approx`, `fail`, `skip`, `fixture`, `mark.parametrize`, other marks without effect, test
functions, and `Test*` classes with `setup_method`. Tests that use other features count as malformed test cases, not as
failures of the program.
"""

from __future__ import annotations

import cmath
import contextlib
import functools
import inspect
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

_fixtures: dict[str, Callable[..., Any]] = {}
_parameters: dict[Callable[..., Any], list[tuple[list[str], list[Any]]]] = {}


class UnsupportedError(Exception):
    """The tests use a feature of pytest that is not supported."""


class Skipped(Exception):
    """The test called `skip`."""


@dataclass(frozen=True)
class Test:
    """A test function with the arguments of its parametrization, and its class if it is a method."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    owner: type | None = None


def make_module() -> types.ModuleType:
    """Return the module that tests import as `pytest`."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(f"the tests use pytest.{name}, which is not supported")

    module = types.ModuleType("pytest")
    names = {"raises": raises, "approx": Approx, "fail": fail, "skip": skip, "fixture": fixture, "mark": _Marks()}
    module.__dict__.update(names, param=lambda *values, **_: values, __getattr__=missing)
    return module


def parametrized(function: Callable[..., Any], owner: type | None = None) -> Iterator[Test]:
    """Yield one test per combination of the function's parameters."""
    axes = []
    for names, values in _parameters.get(function, []):
        rows = [value if len(names) > 1 else (value,) for value in values]
        axes.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*axes):
        yield Test(function, {k: v for part in combination for k, v in part.items()}, owner)


@contextlib.contextmanager
def with_fixtures(test: Test, scope: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    """Yield a function that calls the test with its fixtures."""
    with contextlib.ExitStack() as stack:
        instance = test.owner() if test.owner else None
        if instance is not None and "setup_method" in dir(instance):
            setup: Any = instance.setup_method  # type: ignore[attr-defined]
            setup(*(test.function,)[: len(inspect.signature(setup).parameters)])
        values: dict[str, Any] = dict(test.arguments)
        names = list(inspect.signature(test.function).parameters)[test.owner is not None :]
        arguments = {name: _fixture(name, values, stack, instance) for name in names}
        bound = (instance,) if instance is not None else ()
        yield functools.partial(test.function, *bound, **arguments)


def _fixture(name: str, values: dict[str, Any], stack: contextlib.ExitStack, instance: object | None) -> Any:
    if name in values:
        return values[name]
    if name not in _fixtures:
        raise UnsupportedError(f"the tests use the fixture {name}, which is not supported")
    function = _fixtures[name]
    names = list(inspect.signature(function).parameters)
    bound = (instance,) if names[:1] == ["self"] else ()
    value = function(*bound, **{n: _fixture(n, values, stack, instance) for n in names[len(bound) :]})
    if inspect.isgenerator(value):
        generator = value
        value = next(generator)
        stack.callback(next, generator, None)
    values[name] = value
    return value


def fixture(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Register a fixture. Arguments are ignored, so every fixture has function scope."""
    if function is None:
        return fixture
    _fixtures[function.__name__] = function
    return function


class _Marks:
    """`pytest.mark`: `parametrize`, and other marks without effect."""

    def __getattr__(self, name: str) -> Any:
        if name == "parametrize":
            return _parametrize

        def mark(*args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function

        return mark


def _parametrize(names: str | Sequence[str], values: Sequence[Any], **_: Any) -> Callable[..., Any]:
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        _parameters.setdefault(function, []).append((listed, list(values)))
        return function

    return mark


def fail(reason: str = "", **_: Any) -> None:
    """Fail the test."""
    raise AssertionError(reason)


def skip(reason: str = "", **_: Any) -> None:
    """Skip the test, which counts as passed."""
    raise Skipped(reason)


class raises:
    """Expect an exception: `with raises(kind, match=...) as info`, or `raises(kind, function, *args)`."""

    kind: Any
    match: str | None
    value: Any

    def __new__(cls, kind: Any, *args: Any, match: str | None = None, **named: Any) -> Any:
        self = super().__new__(cls)
        self.kind, self.match, self.value = kind, match, None
        if args:
            with self:
                args[0](*args[1:], **named)
        return self

    @property
    def type(self) -> Any:
        """Class of the exception."""
        return type(self.value)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> bool:
        if error is None:
            raise AssertionError(f"did not raise {self.kind}")
        if not isinstance(error, self.kind):
            return False
        self.value = error
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError(f"{self.match!r} does not match {str(error)!r}")
        return True


class Approx:
    """An object that equals numbers close to `expected`, and lists, tuples and dicts of such numbers."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, **_: Any) -> None:
        self._expected = expected
        self._bounds = {"rel_tol": 1e-6 if rel is None and abs is None else rel or 0.0, "abs_tol": abs or 1e-12}

    def __eq__(self, actual: object) -> bool:
        return self._is_close(self._expected, actual)

    def _is_close(self, expected: Any, actual: Any) -> bool:
        if isinstance(expected, dict):
            same = isinstance(actual, dict) and expected.keys() == actual.keys()
            return same and all(self._is_close(value, actual[key]) for key, value in expected.items())
        if isinstance(expected, list | tuple):
            same = isinstance(actual, list | tuple) and len(actual) == len(expected)
            return same and all(map(self._is_close, expected, actual))
        numbers: Any = (expected, actual)
        if all(isinstance(number, Number) for number in numbers):
            if any(isinstance(number, complex) for number in numbers):
                return cmath.isclose(*map(complex, numbers), **self._bounds)
            return math.isclose(*map(float, numbers), **self._bounds)
        return bool(expected == actual)
