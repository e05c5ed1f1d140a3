"""Remote procedure calls between unit tests and the program that they test, which run in two processes.

In one process, the program could exit it, patch the functions that compare values, or return an object that equals
everything. Here, data is copied (see `values`), and the other objects stay in their process:

* The program may do everything with objects of the tests that its own code could do, except for private names.
* The tests may do little with objects of the program; see `program_objects`.
* If a function modifies an argument in place, the argument of the caller changes, too.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import dataclasses
import inspect
import io
import json
import operator
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum, EnumMeta
from types import ModuleType
from typing import Any

from roll_gspo.sandbox import local_classes, messages, values

TESTS_MODULES = ("tests", "__main__")
PROGRAM_MODULE = "solution"
_MAX_MESSAGE = 64 << 20
_MUTABLE = {"list", "dict", "mapping", "bytearray", "new", "named", "array", "record"}
OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("eq", "ne", "lt", "le", "gt", "ge", "contains")},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("getitem", "setitem", "delitem", "neg", "pos", "abs")},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    **{f"__{n}__": operator.__dict__[f"__{n}__"] for n in ("and", "or", "xor", "matmul", "lshift", "rshift", "invert")},
    **{"__len__": len, "__iter__": iter, "__next__": next, "__bool__": bool, "__hash__": hash, "__str__": str},
    **{"__repr__": repr, "__int__": int, "__float__": float, "__reversed__": reversed, "__format__": format},
    **{"__index__": operator.index, "__instancecheck__": lambda kind, value: isinstance(value, kind)},
    "__aiter__": aiter,
    "__anext__": lambda value: value.__anext__(),
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *error: value.__exit__(*(error or (None, None, None))),
    "__aenter__": lambda value: value.__aenter__(),
    "__aexit__": lambda value, *error: value.__aexit__(*(error or (None, None, None))),
}


class LostError(BaseException):
    """The other process has ended."""


class Connection:
    """One end of the connection.

    Args:
        sock: socket to the peer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._runner = asyncio.Runner()
        self._exported: dict[int, Any] = {}  # objects by id
        self._ids: dict[int, int] = {}  # ids by address of the object
        self._made: dict[Any, int] = {}  # ids of the peer's classes by the class made here

    def request(self, action: str, id_: int, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """Let the peer perform an action on its object, and serve requests of the peer until the result arrives."""
        packed = {"args": [self.pack(a) for a in args], "kwargs": self._pack_values(kwargs)}
        self._send({"do": action, "on": id_, **packed})
        while True:
            message = self._receive()
            if "do" in message:
                self._serve(message)
                continue
            for index, changed in message.get("changed", ()):
                values.assign(args[index], self.unpack(changed))
            return self._result(message, args)

    def _result(self, message: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
        if message.get("awaited"):
            return self._awaitable(message)
        if "error" in message:
            raise self._exception(message["error"])
        return args[message["argument"]] if "argument" in message else self.unpack(message["value"])

    def _awaitable(self, message: Mapping[str, Any]) -> Any:
        """Return an awaitable of a result."""
        return self._wait({**message, "awaited": False})

    async def _wait(self, message: Mapping[str, Any]) -> Any:
        return self._result(message, ())

    def _serve(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {}
        try:
            args = [self.unpack(a) for a in message["args"]]
            kwargs = {k: self.unpack(v) for k, v in message["kwargs"].items()}
            value = self._perform(message["do"], self._exported[message["on"]], args, kwargs)
            if inspect.isawaitable(value):
                answer["awaited"] = True
                value = self._run(_await(value))
            same = [i for i, a in enumerate(args) if a is value and isinstance(message["args"][i], list)]
            answer.update({"argument": same[0]} if same and not answer else {"value": self.pack(value)})
        except LostError:
            raise
        except BaseException as error:
            answer, args = {**answer, "error": self._error(error)}, []
        before = [(i, now) for i, now in enumerate(message["args"][: len(args)]) if _is_mutable(now)]
        after = [(i, self.pack(args[i]), was) for i, was in before]
        answer["changed"] = [(i, now) for i, now, was in after if now != was]
        self._send(answer)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the event loop of this end, or in another thread if this one runs an event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._runner.run(coroutine)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, coroutine).result()

    def _perform(self, action: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if action == "call":
            return target(*args, **kwargs)
        if action in OPERATORS:
            return OPERATORS[action](target, *args)
        return {"get": getattr, "set": setattr, "del": delattr}[action](target, *args)

    def pack(self, value: Any) -> Any:
        """Return a value as JSON values."""
        return values.pack(value, self._reference)

    def unpack(self, value: Any) -> Any:
        """Return the copy of a packed value, or a proxy of an object."""
        return values.unpack(value, self._resolve)

    def export(self, value: Any) -> int:
        """Return the id with which the peer can send requests for an object."""
        if id(value) not in self._ids:
            self._ids[id(value)] = len(self._exported)
            self._exported[len(self._exported)] = value
        return self._ids[id(value)]

    def _reference(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, type) and value in self._made:
            return ["exported", self._made[value]]
        if kind in self._made and isinstance(value, Enum):
            return ["member", ["exported", self._made[kind]], value.name]
        if kind in self._made and dataclasses.is_dataclass(kind):
            fields = [self.pack(v) for v in local_classes.record_values(value)]
            return ["record", ["exported", self._made[kind]], fields]
        if inspect.isclass(value) and issubclass(value, BaseException):
            known = vars(builtins).get(value.__name__) is value
            bases = [] if known else [self._reference(b) for b in value.__bases__ if issubclass(b, BaseException)]
            return ["exception", self.export(value), value.__name__, bases]
        if isinstance(value, BaseException):
            return ["error", self._error(value)]
        return self._object(value)

    def _object(self, value: Any) -> Any:
        """Pack an object that stays in this process."""
        raise NotImplementedError

    def _proxy(self, kind: str, id_: int, rest: list[Any]) -> Any:
        """Return the proxy of an object of the peer."""
        raise NotImplementedError

    def _resolve(self, value: list[Any]) -> Any:
        kind, first, *rest = value
        if kind == "exported":
            return self._exported[first]
        if kind == "member":
            return self.unpack(first)[rest[0]]
        if kind == "record":
            return self.unpack(first)(*(self.unpack(v) for v in rest[0]))
        if kind == "error":
            return self._exception(first)
        return self._proxy(kind, first, rest)

    def _make(self, kind: str, id_: int, rest: list[Any]) -> Any:
        """Make the class of a description."""
        if kind == "exception":
            made: Any = local_classes.make_exception_class(rest[0], [self.unpack(base) for base in rest[1]])
        elif kind == "enum":
            made = local_classes.make_enum(rest[0], rest[1], rest[2], self.unpack)
        else:
            made = local_classes.make_record(rest[0], rest[1], rest[2], rest[3], self.unpack)
        if vars(builtins).get(made.__name__) is not made:
            self._made[made] = id_
        return made

    def _error(self, error: BaseException) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(error).items() if not k.startswith("_") and k.isidentifier()}
        try:
            text = str(error)
        except BaseException:
            text = ""
        return {
            "class": self._reference(type(error)),
            "args": self.pack(list(error.args)),
            "attributes": self._pack_values(attributes),
            "text": text,
        }

    def _exception(self, message: dict[str, Any]) -> BaseException:
        kind = self.unpack(message["class"])
        attributes = {name: self.unpack(value) for name, value in message["attributes"].items()}
        return local_classes.make_exception(kind, self.unpack(message["args"]), attributes, message["text"])

    def _pack_values(self, named: Mapping[str, Any] | None) -> dict[str, Any]:
        return {name: self.pack(value) for name, value in (named or {}).items()}

    def _send(self, message: dict[str, Any]) -> None:
        try:
            messages.send(self._sock, {}, json.dumps(message).encode())
        except OSError:
            raise LostError("the other process has ended") from None

    def _receive(self) -> dict[str, Any]:
        try:
            return json.loads(messages.receive(self._sock, max_body=_MAX_MESSAGE)[1])
        except (EOFError, OSError):
            raise LostError("the other process has ended") from None


async def _await(value: Any) -> Any:
    return await value


def _is_mutable(packed: Any) -> bool:
    """Return whether a packed value may change in a call."""
    return isinstance(packed, list) and packed[0] in _MUTABLE


class TestsObject:
    """Proxy of an object of the tests, which the program can use like its own."""

    # Other attribute names are forwarded to the object, so these names must be unusual.
    __slots__ = ("_connection", "_remote_id")

    def __init__(self, connection: Connection, remote_id: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_remote_id", remote_id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._connection.request("call", self._remote_id, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._connection.request("get", self._remote_id, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.request("set", self._remote_id, (name, value))

    def __delattr__(self, name: str) -> None:
        self._connection.request("del", self._remote_id, (name,))


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: TestsObject, *args: Any) -> Any:
        return self._connection.request(name, self._remote_id, () if name.endswith("exit__") else args)

    return forward


for _name in OPERATORS:
    setattr(TestsObject, _name, _forward(_name))


class ProgramEnd(Connection):
    """The end of the program."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._proxies: dict[int, Any] = {}

    def serve_names(self, names: Mapping[str, Any]) -> None:
        """Send names to the tests, then serve their requests until they end."""
        sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)
        self._send({"names": [[name, self.pack(value)] for name, value in names.items()]})
        while True:
            self._serve(self._receive())

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message with the text that the program has printed, which the tests print again."""
        stdout = sys.stdout
        if isinstance(stdout, io.TextIOWrapper) and isinstance(stdout.buffer, io.BytesIO):
            message = {**message, "printed": stdout.buffer.getvalue().decode("utf-8", "replace")}
            stdout.buffer.seek(0)
            stdout.buffer.truncate()
        super()._send(message)

    def _object(self, value: Any) -> Any:
        if type(value) is TestsObject:
            return ["exported", value._remote_id]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Enum):
            return ["member", self._reference(type(value)), value.name]
        if local_classes.is_record(type(value)):
            fields = [self.pack(v) for v in local_classes.record_values(value)]
            return ["record", self._reference(type(value)), fields]
        kind = "object"
        if inspect.isasyncgen(value):
            kind = "async iterator"
        elif type(value).__module__ in ("builtins", "itertools") and "__next__" in dir(type(value)):
            kind = "generator" if inspect.isgenerator(value) else "iterator"
        elif callable(value):
            kind = "callable"
        return [kind, self.export(value), [self.export(base) for base in type(value).__mro__]]

    def _class(self, value: Any) -> Any:
        id_ = self.export(value)
        if values.is_named_tuple(value):
            return ["named class", id_, value.__name__, list(value._fields)]
        if isinstance(value, EnumMeta) and list(value):
            return ["enum", id_, *local_classes.describe_enum(value, self.pack)]
        if local_classes.is_record(value):
            return ["record class", id_, *local_classes.describe_record(value, self.pack)]
        return ["class", id_, [self.export(base) for base in value.__mro__]]

    def _proxy(self, kind: str, id_: int, rest: list[Any]) -> Any:
        if id_ not in self._proxies:
            self._proxies[id_] = TestsObject(self, id_) if kind == "object" else self._make(kind, id_, rest)
        return self._proxies[id_]


def serve(sock: socket.socket, names: Mapping[str, Any]) -> None:
    """Serve the names of a program to unit tests until they end."""
    try:
        ProgramEnd(sock).serve_names({k: v for k, v in names.items() if not isinstance(v, ModuleType)})
    except LostError:
        return
