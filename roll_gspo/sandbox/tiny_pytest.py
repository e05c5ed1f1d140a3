"""The part of pytest that generated unit tests use; importing the real one would cost more than the tests.

`raises`, `approx`, `fail`, `skip`, `fixture`, `mark.parametrize` and other marks (without effect); test functions,
`Test*` classes with `setup_method`. What is missing makes the test cases count as malformed, not the program as wrong.
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
    """The tests use something of pytest that is not here."""


class Skipped(Exception):
    """The test skipped itself."""


@dataclass(frozen=True)
class Test:
    """One test function with the arguments of its parametrization, and the class that it is a method of."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    owner: type | None = None


def module() -> types.ModuleType:
    """What `import pytest` gives."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(f"the tests use pytest.{name}, which is not supported")

    made = types.ModuleType("pytest")
    offered = {"raises": raises, "approx": Approx, "fail": fail, "skip": skip, "fixture": fixture, "mark": _Marks()}
    made.__dict__.update(offered, param=lambda *values, **_: values, __getattr__=missing)
    return made


def variants(function: Callable[..., Any], owner: type | None = None) -> Iterator[Test]:
    """The function once for each combination of its parameters."""
    axes = []
    for names, values in _parameters.get(function, []):
        rows = [value if len(names) > 1 else (value,) for value in values]
        axes.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*axes):
        yield Test(function, {k: v for part in combination for k, v in part.items()}, owner)


@contextlib.contextmanager
def prepared(test: Test, space: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    """The test with its fixtures, ready to be called."""
    with contextlib.ExitStack() as stack:
        instance = test.owner() if test.owner else None
        if instance is not None and "setup_method" in dir(instance):
            setup: Any = instance.setup_method  # type: ignore[attr-defined]
            setup(*(test.function,)[: len(inspect.signature(setup).parameters)])
        made: dict[str, Any] = dict(test.arguments)
        names = list(inspect.signature(test.function).parameters)[test.owner is not None :]
        arguments = {name: _fixture(name, made, stack, instance) for name in names}
        bound = (instance,) if instance is not None else ()
        yield functools.partial(test.function, *bound, **arguments)


def _fixture(name: str, made: dict[str, Any], stack: contextlib.ExitStack, instance: object | None) -> Any:
    if name in made:
        return made[name]
    if name not in _fixtures:
        raise UnsupportedError(f"the tests use the fixture {name}, which is not supported")
    function = _fixtures[name]
    names = list(inspect.signature(function).parameters)
    bound = (instance,) if names[:1] == ["self"] else ()
    value = function(*bound, **{n: _fixture(n, made, stack, instance) for n in names[len(bound) :]})
    if inspect.isgenerator(value):
        generator = value
        value = next(generator)
        stack.callback(next, generator, None)
    made[name] = value
    return value


def fixture(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """With or without arguments, which are ignored: fixtures are made anew for each test."""
    if function is None:
        return fixture
    _fixtures[function.__name__] = function
    return function


class _Marks:
    """`pytest.mark`: parametrize, and others, which do nothing."""

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
    """End the test; it counts as passed."""
    raise Skipped(reason)


class raises:
    """`with raises(kind, match=...) as info`, or `raises(kind, function, *args)`."""

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
        """Class of what was raised."""
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
    """Equal to numbers near `expected`, and to lists, tuples and dicts of such."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, **_: Any) -> None:
        self._expected = expected
        self._bounds = {"rel_tol": 1e-6 if rel is None and abs is None else rel or 0.0, "abs_tol": abs or 1e-12}

    def __eq__(self, actual: object) -> bool:
        return self._near(self._expected, actual)

    def _near(self, expected: Any, actual: Any) -> bool:
        if isinstance(expected, dict):
            same = isinstance(actual, dict) and expected.keys() == actual.keys()
            return same and all(self._near(value, actual[key]) for key, value in expected.items())
        if isinstance(expected, list | tuple):
            same = isinstance(actual, list | tuple) and len(actual) == len(expected)
            return same and all(map(self._near, expected, actual))
        numbers: Any = (expected, actual)
        if all(isinstance(number, Number) for number in numbers):
            if any(isinstance(number, complex) for number in numbers):
                return cmath.isclose(*map(complex, numbers), **self._bounds)
            return math.isclose(*map(float, numbers), **self._bounds)
        return bool(expected == actual)
