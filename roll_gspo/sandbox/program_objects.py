"""Proxies of the program's objects in the process of the unit tests.

The program would answer every question about its objects in its favour. The tests can therefore do only this:

* A function can be called, and an iterator yields data.
* Attributes of an object can be read and set, and its methods called. Methods that data has, too, such as `startswith`,
  are refused: the tests expect data, and the object would only pretend to be it.
* An object that the tests make from a class that they name (`Stack()`) has also the methods that data has, a length,
  a text, items, iteration and arithmetic with other objects of the program.
* Comparisons and truth are always refused. So are arithmetic with data whose result is data, and questions to an
  object that results from it, because the program has seen the expected value by then.

A refusal raises `RefusedError`, which no `except Exception` of the tests catches, and the test fails.
"""

from __future__ import annotations

import collections.abc
import dis
import socket
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from roll_gspo.sandbox import local_classes, rpc, values

_QUESTIONS = {
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "bool",
        "int",
        "float",
        "complex",
        "index",
        "round",
        "trunc",
        "floor",
        "ceil",
    ),
    *("bytes", "array", "fspath"),
}
_BINARY = {
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift", "rshift"),
}
_UNARY = {"neg", "pos", "abs", "invert"}
_REFLECTED = {f"{prefix}{name}" for name in _BINARY for prefix in "ri"} | {"divmod", "rdivmod"}
_PROTOCOLS = {"len", "next", "iter", "reversed", "contains", "getitem", "setitem", "delitem"}
_READABLE = {"__name__", "__qualname__", "__doc__", "__dict__", "__annotations__", "__module__", "__call__"}
_METHODS_OF_DATA = {
    name for kind in (str, bytes, frozenset, tuple, int, float, range) for name in dir(kind) if not name.startswith("_")
} | {"all", "any", "equals", "is_zero", "total_seconds"}


class RefusedError(BaseException):
    """The tests ask an object of the program a question that only data can answer."""


class ProgramObject:
    """Proxy of an object of the program."""

    # Other attribute names are forwarded to the object, so these names must be unusual.
    __slots__ = ("_connection", "_remote_classes", "_remote_id", "_remote_is_made_by_tests")

    def __init__(self, connection: TestsEnd, remote_id: int, classes: tuple[int, ...], made_by_tests: bool) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_remote_id", remote_id)
        object.__setattr__(self, "_remote_classes", classes)
        object.__setattr__(self, "_remote_is_made_by_tests", made_by_tests)

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_pytest") or (name.startswith("__") and name not in _READABLE):
            raise AttributeError(name)
        value = _ask(self, "get", name)
        pretends = isinstance(value, ProgramCallable) and name in _METHODS_OF_DATA
        if pretends and not self._remote_is_made_by_tests and not self._connection.is_named_class(self):
            self._connection.refuse(f".{name}()")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "del", name)

    def __repr__(self) -> str:
        return _text(_ask(self, "__repr__")) if self._remote_is_made_by_tests else "<object of the program>"

    def __str__(self) -> str:
        return _text(_ask(self, "__str__")) if self._remote_is_made_by_tests else "<object of the program>"

    def __format__(self, spec: str) -> str:
        return _text(_ask(self, "__format__", spec)) if self._remote_is_made_by_tests else str(self)

    def __enter__(self) -> Any:
        value = _ask(self, "__enter__")
        return self if _is_same(self, value) else value

    def __exit__(self, kind: Any, error: BaseException | None, trace: types.TracebackType | None) -> bool:
        return _is_raised_by_tests(error, trace) & (_ask(self, "__exit__", *_own_error(error)) is True)

    async def __aenter__(self) -> Any:
        value = await _ask(self, "__aenter__")
        return self if _is_same(self, value) else value

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: types.TracebackType | None) -> bool:
        return _is_raised_by_tests(error, trace) & (await _ask(self, "__aexit__", *_own_error(error)) is True)

    def __aiter__(self) -> Any:
        return _ask(self, "__aiter__")


class ProgramCallable(ProgramObject):
    """Proxy of a function, or of an object that can be called."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._connection.call(self, args, kwargs)


class ProgramClass(ProgramCallable):
    """Proxy of a class."""

    __slots__ = ()

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(type(instance), type) and issubclass(type(instance), ProgramObject) and self._has(instance)

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, ProgramClass) and self._has(kind)

    def _has(self, other: Any) -> bool:
        return self._remote_id in other._remote_classes


class ProgramIterator(ProgramObject):
    """Proxy of an iterator."""

    __slots__ = ()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return _ask(self, "__next__")

    def __len__(self) -> int:
        raise TypeError("an iterator has no len()")  # `list` asks for it


class ProgramGenerator(ProgramIterator):
    """Proxy of a generator."""

    __slots__ = ()
    __class__ = property(lambda self: types.GeneratorType)  # type: ignore[assignment]


class ProgramAsyncIterator(ProgramObject):
    """Proxy of an asynchronous generator."""

    __slots__ = ()

    def __aiter__(self) -> Any:
        return self

    def __anext__(self) -> Any:
        return _ask(self, "__anext__")


class ProgramAwaitable(collections.abc.Coroutine):
    """Result of a coroutine of the program, which has ended; awaiting it returns its value."""

    def __init__(self, connection: TestsEnd, waiting: Any) -> None:
        self._connection, self._waiting = connection, waiting

    __hash__ = object.__hash__

    def __await__(self) -> Any:
        return self._waiting.__await__()

    def send(self, value: Any) -> Any:
        """Resume the coroutine with a value."""
        return self._waiting.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error in the coroutine."""
        return self._waiting.throw(*error)

    def close(self) -> None:
        """End the coroutine."""
        self._waiting.close()


def _ask(self: ProgramObject, action: str, *args: Any) -> Any:
    return self._connection.request(action, self._remote_id, args)


def _is_same(proxy: ProgramObject, value: Any) -> bool:
    return isinstance(value, ProgramObject) and value._remote_id == proxy._remote_id


def _text(value: Any) -> str:
    return value if type(value) is str else "<object of the program>"


def _own_error(error: BaseException | None) -> tuple[Any, ...]:
    """Return the arguments of `__exit__` for an error that the program may see."""
    return (type(error), error, None) if isinstance(error, Exception) else (None, None, None)


def _is_raised_by_tests(error: BaseException | None, trace: types.TracebackType | None) -> bool:
    """Return whether a `raise` statement of the tests raised an error.

    The program must not suppress failed assertions, and errors that it raised.
    """
    if not isinstance(error, Exception) or isinstance(error, AssertionError) or trace is None:
        return False
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_filename == "tests.py" and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any) -> Any:
        self._connection.refuse(f"__{name}__")

    return refuse


def _forward(name: str) -> Callable[..., Any]:
    """Return a method for objects that the tests made, which is refused for others."""

    def forward(self: ProgramObject, *args: Any) -> Any:
        if not self._remote_is_made_by_tests:
            self._connection.refuse(f"__{name}__")
        value = _ask(self, f"__{name}__", *args)
        if name in _PROTOCOLS:
            return value
        if all(isinstance(arg, ProgramObject) for arg in args):
            return self._connection.made_by_tests(value) if isinstance(value, ProgramObject) else value
        if not isinstance(value, ProgramObject):
            self._connection.refuse(f"__{name}__ with data")
        return value

    return forward


def _iterate(self: ProgramObject) -> Any:
    value = _forward("iter")(self)
    if type(value) is ProgramObject:  # an iterator of a class of the program
        return ProgramIterator(value._connection, value._remote_id, value._remote_classes, False)
    return value


for _name in _QUESTIONS | _REFLECTED | _BINARY | _UNARY | _PROTOCOLS:
    _forwards = _name in _BINARY | _UNARY | _PROTOCOLS
    setattr(ProgramObject, f"__{_name}__", _forward(_name) if _forwards else _refuse(_name))
    if _name != "next":  # asyncio prefers it to `send`
        setattr(ProgramAwaitable, f"__{_name}__", _refuse(_name))
ProgramObject.__iter__ = _iterate  # type: ignore[attr-defined]
_PROXIES: dict[str, type[ProgramObject]] = {
    "object": ProgramObject,
    "callable": ProgramCallable,
    "class": ProgramClass,
    "iterator": ProgramIterator,
    "generator": ProgramGenerator,
    "async iterator": ProgramAsyncIterator,
}


class TestsEnd(rpc.Connection):
    """The end of the tests.

    Args:
        sock: socket to the program.
        named_classes: names of classes of the program that the tests use.

    Attributes:
        refusals: number of refused questions, and of requests that the program could not answer because it ended.
    """

    def __init__(self, sock: socket.socket, named_classes: set[str]) -> None:
        super().__init__(sock)
        self.refusals = 0
        self._named_classes = named_classes
        self._named_ids: set[int] = set()
        self._proxies: dict[tuple[int, bool], Any] = {}

    def receive_names(self) -> dict[str, Any]:
        """Receive the names that the program defines, which is its first message."""
        names = {name: self.unpack(value) for name, value in self._receive()["names"]}
        self._named_ids = {
            value._remote_id
            for name, value in names.items()
            if name in self._named_classes and isinstance(value, ProgramClass)
        }
        return {name: value for name, value in names.items() if name.isidentifier() and not name.startswith("__")}

    def refuse(self, question: str) -> None:
        """Raise `RefusedError`."""
        self.refusals += 1
        raise RefusedError(f"the tests use {question} of an object of the program; return data instead")

    def call(self, function: ProgramCallable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of the program."""
        value = self.request("call", function._remote_id, args, kwargs)
        made = self.is_named_class(function) and isinstance(value, ProgramObject)
        return self.made_by_tests(value) if made else value

    def is_named_class(self, value: ProgramObject) -> bool:
        """Return whether a value is a class that the tests name."""
        return type(value) is ProgramClass and value._remote_id in self._named_ids

    def made_by_tests(self, value: ProgramObject) -> ProgramObject:
        """Return the proxy of an object that the tests made, if they name its class."""
        if not value._remote_classes or value._remote_classes[0] not in self._named_ids:
            return value
        return self._proxied(type(value), value._remote_id, value._remote_classes, made_by_tests=True)

    def _receive(self) -> dict[str, Any]:
        try:
            message = super()._receive()
            if message.get("printed"):
                sys.stdout.write(message["printed"])
            return message
        except rpc.LostError:
            self.refusals += 1
            raise

    def _proxied(self, kind: type[ProgramObject], id_: int, classes: tuple[int, ...], made_by_tests: bool) -> Any:
        key = (id_, made_by_tests)
        if key not in self._proxies:
            self._proxies[key] = kind(self, id_, classes, made_by_tests)
        return self._proxies[key]

    def _proxy(self, kind: str, id_: int, rest: list[Any]) -> Any:
        if kind in _PROXIES:
            return self._proxied(_PROXIES[kind], id_, tuple(rest[0]), made_by_tests=False)
        if kind == "named class":
            return values.named_tuple(rest[0], tuple(rest[1]))
        if (id_, False) not in self._proxies:
            made = self._make(kind.removesuffix(" class"), id_, rest)
            if isinstance(made, local_classes.ExceptionClass):
                made.construct = lambda *args, **kwargs: self.request("call", id_, args, kwargs)
            self._proxies[id_, False] = made
        return self._proxies[id_, False]

    def _awaitable(self, message: Mapping[str, Any]) -> Any:
        return ProgramAwaitable(self, super()._awaitable(message))

    def _object(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            raise TypeError("a module of the tests cannot be passed to the program")
        if issubclass(type(value), ProgramObject):
            return ["exported", value._remote_id]
        return ["object", self.export(value)]

    def _perform(self, action: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kind = target if isinstance(target, type) else type(target)
        is_private = action in ("get", "set", "del") and str(args[0]).startswith("_")
        is_foreign = kind.__module__ not in rpc.TESTS_MODULES and action not in ("__iter__", "__next__")
        if action != "call" and (is_private or is_foreign):
            raise AttributeError(f"the program has no access to a {kind.__name__} of the tests")
        return super()._perform(action, target, args, kwargs)
