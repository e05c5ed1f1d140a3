"""An exam and the program it examines in two processes: calls go over, plain data comes back.

Unit tests that come as code call the program's functions. Were both in one process, the program could end it, patch
what compares, or return an object that equals everything. Here the tests have the names of the program as `Remote`s.
Numbers, texts, containers and dates are copied, so that the exam compares its own objects; functions, classes and
instances stay where they are and are used through messages. An argument that the callee changed in place is changed
for the caller. A `Remote` never equals plain data, and is never less or more than it: only the program could say so.
Nor does calculating with it and plain data give a number, such as `abs(f(2) - 1.4)` that the tests then find small.

Both ends are the same, but what the examined side may do to the exam's functions is call them.
"""

from __future__ import annotations

import asyncio
import builtins
import collections
import datetime
import decimal
import fractions
import inspect
import json
import operator
import socket
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Integral, Number, Real
from types import ModuleType
from typing import Any

from roll_gspo.sandbox import frames

_MAX_MESSAGE = 64 << 20
_PLAIN = (type(None), bool, int, float, str)
_BY_ARGUMENTS: dict[str, tuple[type, Callable[[Any], list[Any]]]] = {
    "tuple": (tuple, lambda v: [list(v)]),
    "set": (set, lambda v: [list(v)]),
    "frozenset": (frozenset, lambda v: [list(v)]),
    "bytes": (bytes, lambda v: [list(v)]),
    "bytearray": (bytearray, lambda v: [list(v)]),
    "complex": (complex, lambda v: [v.real, v.imag]),
    "range": (range, lambda v: [v.start, v.stop, v.step]),
    "deque": (collections.deque, lambda v: [list(v), v.maxlen]),
    "Decimal": (decimal.Decimal, lambda v: [str(v)]),
    "Fraction": (fractions.Fraction, lambda v: [v.numerator, v.denominator]),
    "datetime": (
        datetime.datetime,
        lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    ),
    "date": (datetime.date, lambda v: [v.year, v.month, v.day]),
    "time": (datetime.time, lambda v: [v.hour, v.minute, v.second, v.microsecond]),
    "timedelta": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds]),
}
_BASES = (*(bool, int, float, str, list, dict, tuple, set, frozenset, bytes, bytearray),)
_MAPPINGS = {"Counter": collections.Counter, "OrderedDict": collections.OrderedDict, "defaultdict": dict}
_KIND_OF = {kind: name for name, (kind, _) in _BY_ARGUMENTS.items()}
_CALCULATIONS = {
    *("__neg__", "__abs__", "__invert__", "__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__"),
    *("__pow__", "__and__", "__or__", "__xor__", "__matmul__", "__lshift__", "__rshift__"),
}
_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: operator.__dict__[name] for name in sorted(_COMPARISONS)},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("contains", "getitem", "setitem", "delitem", "neg", "abs")},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("and", "or", "xor", "matmul", "lshift", "rshift", "invert")},
    **{"__len__": len, "__iter__": iter, "__next__": next, "__bool__": bool, "__hash__": hash, "__str__": str},
    **{"__repr__": repr, "__int__": int, "__float__": float, "__reversed__": reversed, "__format__": format},
    **{"__index__": operator.index, "__instancecheck__": lambda kind, value: isinstance(value, kind)},
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *_: value.__exit__(None, None, None),
}


class Remote:
    """A function, class or instance of the other process."""

    __slots__ = ("_calculated", "_connection", "_number")

    def __init__(self, connection: Connection, number: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_calculated", False)  # with plain data

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._connection.ask("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._connection.ask("get", self._number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.ask("set", self._number, (name, value))

    def __delattr__(self, name: str) -> None:
        self._connection.ask("del", self._number, (name,))


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: Remote, *args: Any) -> Any:
        if name in _COMPARISONS and not isinstance(args[0], Remote):
            return NotImplemented
        if name == "__exit__":
            args = ()
        value = self._connection.ask(name, self._number, args)
        if name in _CALCULATIONS and (self._calculated or not all(isinstance(arg, Remote) for arg in args)):
            if isinstance(value, Number):
                raise TypeError("a class of the program may not calculate numbers for the tests")
            if isinstance(value, Remote):
                object.__setattr__(value, "_calculated", True)
        return bool(value) if name in _COMPARISONS else value

    return forward


for _name in _OPERATORS:
    setattr(Remote, _name, _forward(_name))


class Connection:
    """One end.

    Args:
        sock: to the other.
        guards: whether the other end is not trusted: it may call what it was handed and use instances of the classes
            of `module`, and no more.
        module: `__name__` of the code whose classes these are.
    """

    def __init__(self, sock: socket.socket, guards: bool, module: str) -> None:
        self._sock = sock
        self._guards = guards
        self._module = module
        self._handed: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Any] = {}

    def ask(self, what: str, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """Have the other end do something with a thing of its own, serving it meanwhile."""
        self._send({"do": what, "on": number, "args": [self._pack(a) for a in args], "named": self._named(kwargs)})
        while True:
            message = self._receive()
            if "do" in message:
                self._serve(message)
                continue
            for index, changed in message.get("changed", ()):
                _assign(args[index], self._unpack(changed))
            if "error" in message:
                raise self._exception(message["error"])
            if "argument" in message:
                return args[message["argument"]]
            value = self._unpack(message["value"])
            return _awaitable(value) if message.get("awaited") else value

    def names(self) -> dict[str, Any]:
        """What the other end offers, said first."""
        return {name: self._unpack(value) for name, value in self._receive()["names"]}

    def offer(self, names: Mapping[str, Any]) -> None:
        """Hand over names, then serve until the other end is gone."""
        self._send({"names": [[name, self._pack(value)] for name, value in names.items()]})
        while True:
            self._serve(self._receive())

    def _serve(self, message: dict[str, Any]) -> None:
        try:
            args = [self._unpack(a) for a in message["args"]]
            named = {k: self._unpack(v) for k, v in message["named"].items()}
            value = self._do(message["do"], self._handed[message["on"]], args, named)
            answer: dict[str, Any] = {}
            if inspect.iscoroutine(value):
                value, answer["awaited"] = asyncio.run(value), True
            same = [i for i, a in enumerate(args) if a is value and not isinstance(a, _PLAIN)]
            answer.update({"argument": same[0]} if same else {"value": self._pack(value)})
        except (EOFError, ConnectionError):
            raise
        except BaseException as error:
            answer, args = {"error": self._error(error)}, []
        mutable = (
            (i, a) for i, a in enumerate(args) if isinstance(a, list | dict | set | bytearray | collections.deque)
        )
        packed = [(i, self._pack(a)) for i, a in mutable]
        answer["changed"] = [(i, now) for i, now in packed if now != message["args"][i]]
        self._send(answer)

    def _do(self, what: str, thing: Any, args: list[Any], named: dict[str, Any]) -> Any:
        if what == "call":
            return thing(*args, **named)
        if self._guards:
            kind = thing if inspect.isclass(thing) else type(thing)
            hidden = what in ("get", "set", "del") and str(args[0]).startswith("_")
            if hidden or (kind.__module__ != self._module and what not in ("__iter__", "__next__")):
                raise AttributeError(f"an exam's {kind.__name__} is closed to the program")
        if what in _OPERATORS:
            return _OPERATORS[what](thing, *args)
        return {"get": getattr, "set": setattr, "del": delattr}[what](thing, *args)

    def _pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list:
            plain = all(type(item) in _PLAIN for item in value)
            return ["list", list(value) if plain else [self._pack(item) for item in value]]
        if kind is dict:
            return ["dict", [[self._pack(k), self._pack(v)] for k, v in value.items()]]
        if kind in _KIND_OF:
            parts = _BY_ARGUMENTS[_KIND_OF[kind]][1](value)
            return ["made", _KIND_OF[kind], [self._pack(part) for part in parts]]
        if kind is Remote:
            return ["yours", value._number]
        if kind.__name__ in _MAPPINGS and isinstance(value, dict):
            return ["mapping", kind.__name__, [[self._pack(k), self._pack(v)] for k, v in value.items()]]
        base: Any = next((b for b in _BASES if isinstance(value, b)), None)
        if base is not None and not isinstance(value, Enum):
            return self._pack(base(value))
        if isinstance(value, Real):  # of numpy
            return int(value) if isinstance(value, Integral) else float(value)
        return self._hand(value)

    def _hand(self, value: Any) -> Any:
        """A reference, by which the other end can ask for things to be done with it."""
        if self._guards and isinstance(value, ModuleType):
            raise TypeError("a module cannot be handed to the program")
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._handed)
            self._handed[len(self._handed)] = value
        number = self._numbers[id(value)]
        if inspect.isclass(value) and issubclass(value, BaseException):
            known = builtins.__dict__.get(value.__name__) is value
            bases = [] if known else [self._hand(b) for b in value.__bases__ if issubclass(b, BaseException)]
            return ["exception", number, value.__name__, bases]
        return ["thing", number]

    def _unpack(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, first, *rest = value
        if kind == "list":
            return [self._unpack(item) for item in first]
        if kind == "dict":
            return {self._unpack(k): self._unpack(v) for k, v in first}
        if kind == "made":
            return _BY_ARGUMENTS[first][0](*(self._unpack(part) for part in rest[0]))
        if kind == "mapping":
            return _MAPPINGS[first]({self._unpack(k): self._unpack(v) for k, v in rest[0]})
        if kind == "yours":
            return self._handed[first]
        if first not in self._remotes:
            made = Remote(self, first) if kind == "thing" else self._exception_class(*rest)
            self._remotes[first] = made
        return self._remotes[first]

    def _exception_class(self, name: str, bases: list[Any]) -> type[BaseException]:
        if not bases:
            known = builtins.__dict__.get(name)
            return known if inspect.isclass(known) and issubclass(known, BaseException) else Exception
        return type(name, tuple(self._unpack(base) for base in bases), {})

    def _error(self, error: BaseException) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(error).items() if not k.startswith("_")}
        return {"kind": self._hand(type(error)), "args": self._pack(list(error.args)), "has": self._named(attributes)}

    def _exception(self, message: dict[str, Any]) -> BaseException:
        kind = self._unpack(message["kind"])
        error = kind.__new__(kind)
        error.args = tuple(self._unpack(message["args"]))
        for name, value in message["has"].items():
            setattr(error, name, self._unpack(value))
        return error

    def _named(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        return {name: self._pack(value) for name, value in (values or {}).items()}

    def _send(self, message: dict[str, Any]) -> None:
        frames.send(self._sock, {}, json.dumps(message).encode())

    def _receive(self) -> dict[str, Any]:
        return json.loads(frames.receive(self._sock, max_body=_MAX_MESSAGE)[1])


async def _awaitable(value: Any) -> Any:
    return value


def _assign(old: Any, new: Any) -> None:
    """Give a container the content of another, keeping the containers within it that stayed containers."""
    if isinstance(old, list) and isinstance(new, list):
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            if type(before) is type(after) and isinstance(before, list | dict | set):
                _assign(before, after)
                new[index] = before
        old[:] = new
    elif isinstance(old, dict | set) and isinstance(new, dict | set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray | collections.deque):
        old.clear()
        old.extend(new)


def serve(sock: socket.socket, names: Mapping[str, Any]) -> None:
    """The examined program's side: until the exam is over."""
    try:
        Connection(sock, guards=False, module="solution").offer(names)
    except (EOFError, ConnectionError):
        return
