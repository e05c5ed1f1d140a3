"""Remote procedure calls between unit tests and the program that they test, which run in two processes.

In one process, the program could exit it, patch the functions that compare values, or return an object that equals
everything. Here, the tests see the names of the program as instances of `RemoteObject`.

* Numbers, strings, containers and dates are copied, so that the tests compare their own objects.
* Functions, classes and instances stay in their process and are used through messages.
* If a function modifies an argument in place, the argument of the caller changes, too.
* A `RemoteObject` never equals plain data and is never ordered relative to it, because only the program could decide
  that. Arithmetic with plain data never returns a number. Otherwise, a program could make `abs(f(2) - 1.4)` small.

Both ends use the same code, but the program may only call the functions of the tests.
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

from roll_gspo.sandbox import messages

_MAX_MESSAGE = 64 << 20
_PLAIN = (type(None), bool, int, float, str)
_CONSTRUCTORS: dict[str, tuple[type, Callable[[Any], list[Any]]]] = {
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
_NAME_OF_TYPE = {kind: name for name, (kind, _) in _CONSTRUCTORS.items()}
_ARITHMETIC = {
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


class RemoteObject:
    """Proxy of a function, class or instance of the other process."""

    # Other attribute names are forwarded to the object, so these names must be unusual.
    __slots__ = ("_connection", "_remote_id", "_remote_is_computed")

    def __init__(self, connection: Connection, remote_id: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_remote_id", remote_id)
        object.__setattr__(self, "_remote_is_computed", False)  # True for results of arithmetic with plain data

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._connection.request("call", self._remote_id, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._connection.request("get", self._remote_id, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.request("set", self._remote_id, (name, value))

    def __delattr__(self, name: str) -> None:
        self._connection.request("del", self._remote_id, (name,))


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: RemoteObject, *args: Any) -> Any:
        if name in _COMPARISONS and not isinstance(args[0], RemoteObject):
            return NotImplemented
        if name == "__exit__":
            args = ()
        value = self._connection.request(name, self._remote_id, args)
        if name in _ARITHMETIC and (self._remote_is_computed or not all(isinstance(arg, RemoteObject) for arg in args)):
            if isinstance(value, Number):
                raise TypeError("arithmetic of a class of the program must not return a number to the tests")
            if isinstance(value, RemoteObject):
                object.__setattr__(value, "_remote_is_computed", True)
        return bool(value) if name in _COMPARISONS else value

    return forward


for _name in _OPERATORS:
    setattr(RemoteObject, _name, _forward(_name))


class Connection:
    """One end of the connection.

    Args:
        sock: socket to the peer.
        untrusted_peer: if True, the peer may only call exported objects, and use instances of the classes of `module`.
        module: `__name__` of the code at this end.
    """

    def __init__(self, sock: socket.socket, untrusted_peer: bool, module: str) -> None:
        self._sock = sock
        self._untrusted_peer = untrusted_peer
        self._module = module
        self._exported: dict[int, Any] = {}  # objects by id
        self._ids: dict[int, int] = {}  # ids by address of the object
        self._remotes: dict[int, Any] = {}  # proxies by id

    def request(self, action: str, id_: int, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """Let the peer perform an action on its object, and serve requests of the peer until the result arrives."""
        packed = {"args": [self._pack(a) for a in args], "kwargs": self._pack_values(kwargs)}
        self._send({"do": action, "on": id_, **packed})
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

    def receive_names(self) -> dict[str, Any]:
        """Receive the names that the peer serves, which is its first message."""
        return {name: self._unpack(value) for name, value in self._receive()["names"]}

    def serve_names(self, names: Mapping[str, Any]) -> None:
        """Send names to the peer, then serve its requests until it closes the connection."""
        self._send({"names": [[name, self._pack(value)] for name, value in names.items()]})
        while True:
            self._serve(self._receive())

    def _serve(self, message: dict[str, Any]) -> None:
        try:
            args = [self._unpack(a) for a in message["args"]]
            kwargs = {k: self._unpack(v) for k, v in message["kwargs"].items()}
            value = self._perform(message["do"], self._exported[message["on"]], args, kwargs)
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

    def _perform(self, action: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if action == "call":
            return target(*args, **kwargs)
        if self._untrusted_peer:
            kind = target if inspect.isclass(target) else type(target)
            is_private = action in ("get", "set", "del") and str(args[0]).startswith("_")
            if is_private or (kind.__module__ != self._module and action not in ("__iter__", "__next__")):
                raise AttributeError(f"the program has no access to a {kind.__name__} of the tests")
        if action in _OPERATORS:
            return _OPERATORS[action](target, *args)
        return {"get": getattr, "set": setattr, "del": delattr}[action](target, *args)

    def _pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list:
            plain = all(type(item) in _PLAIN for item in value)
            return ["list", list(value) if plain else [self._pack(item) for item in value]]
        if kind is dict:
            return ["dict", [[self._pack(k), self._pack(v)] for k, v in value.items()]]
        if kind in _NAME_OF_TYPE:
            parts = _CONSTRUCTORS[_NAME_OF_TYPE[kind]][1](value)
            return ["constructed", _NAME_OF_TYPE[kind], [self._pack(part) for part in parts]]
        if kind is RemoteObject:
            return ["exported", value._remote_id]
        if kind.__name__ in _MAPPINGS and isinstance(value, dict):
            return ["mapping", kind.__name__, [[self._pack(k), self._pack(v)] for k, v in value.items()]]
        base: Any = next((b for b in _BASES if isinstance(value, b)), None)
        if base is not None and not isinstance(value, Enum):
            return self._pack(base(value))
        if isinstance(value, Real):  # e.g. numbers of numpy
            return int(value) if isinstance(value, Integral) else float(value)
        return self._export(value)

    def _export(self, value: Any) -> Any:
        """Return a reference to an object, with which the peer can send requests for it."""
        if self._untrusted_peer and isinstance(value, ModuleType):
            raise TypeError("a module of the tests cannot be passed to the program")
        if id(value) not in self._ids:
            self._ids[id(value)] = len(self._exported)
            self._exported[len(self._exported)] = value
        id_ = self._ids[id(value)]
        if inspect.isclass(value) and issubclass(value, BaseException):
            known = builtins.__dict__.get(value.__name__) is value
            bases = [] if known else [self._export(b) for b in value.__bases__ if issubclass(b, BaseException)]
            return ["exception", id_, value.__name__, bases]
        return ["object", id_]

    def _unpack(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, first, *rest = value
        if kind == "list":
            return [self._unpack(item) for item in first]
        if kind == "dict":
            return {self._unpack(k): self._unpack(v) for k, v in first}
        if kind == "constructed":
            return _CONSTRUCTORS[first][0](*(self._unpack(part) for part in rest[0]))
        if kind == "mapping":
            return _MAPPINGS[first]({self._unpack(k): self._unpack(v) for k, v in rest[0]})
        if kind == "exported":
            return self._exported[first]
        if first not in self._remotes:
            self._remotes[first] = RemoteObject(self, first) if kind == "object" else self._exception_class(*rest)
        return self._remotes[first]

    def _exception_class(self, name: str, bases: list[Any]) -> type[BaseException]:
        if not bases:
            known = builtins.__dict__.get(name)
            return known if inspect.isclass(known) and issubclass(known, BaseException) else Exception
        return type(name, tuple(self._unpack(base) for base in bases), {})

    def _error(self, error: BaseException) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(error).items() if not k.startswith("_")}
        return {
            "class": self._export(type(error)),
            "args": self._pack(list(error.args)),
            "attributes": self._pack_values(attributes),
        }

    def _exception(self, message: dict[str, Any]) -> BaseException:
        kind = self._unpack(message["class"])
        error = kind.__new__(kind)
        error.args = tuple(self._unpack(message["args"]))
        for name, value in message["attributes"].items():
            setattr(error, name, self._unpack(value))
        return error

    def _pack_values(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        return {name: self._pack(value) for name, value in (values or {}).items()}

    def _send(self, message: dict[str, Any]) -> None:
        messages.send(self._sock, {}, json.dumps(message).encode())

    def _receive(self) -> dict[str, Any]:
        return json.loads(messages.receive(self._sock, max_body=_MAX_MESSAGE)[1])


async def _awaitable(value: Any) -> Any:
    return value


def _assign(old: Any, new: Any) -> None:
    """Assign the contents of a container to another in place, including nested containers of the same type."""
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
    """Serve the names of a program to unit tests until they end."""
    try:
        Connection(sock, untrusted_peer=False, module="solution").serve_names(names)
    except (EOFError, ConnectionError):
        return
