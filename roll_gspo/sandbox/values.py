"""Plain data that crosses between unit tests and the program: numbers, text, bytes, containers, dates and arrays.

`pack` turns a value into JSON values, and `unpack` makes a copy of it. Neither end keeps a reference to the other's
data, and no method of a program runs when the tests compare its data.
"""

from __future__ import annotations

import base64
import builtins
import collections
import dataclasses
import datetime
import decimal
import fractions
import re
import sys
import zoneinfo
from collections.abc import Callable
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any

PLAIN = (type(None), bool, float, str)
_MAX_JSON_INT = 1 << 62  # larger integers cross as hexadecimal text, which has no limit of digits
_CONSTRUCTORS: dict[str, tuple[type, Callable[[Any], list[Any]]]] = {
    "tuple": (tuple, lambda v: [list(v)]),
    "set": (set, lambda v: [list(v)]),
    "frozenset": (frozenset, lambda v: [list(v)]),
    "complex": (complex, lambda v: [v.real, v.imag]),
    "range": (range, lambda v: [v.start, v.stop, v.step]),
    "slice": (slice, lambda v: [v.start, v.stop, v.step]),
    "deque": (collections.deque, lambda v: [list(v), v.maxlen]),
    "Decimal": (decimal.Decimal, lambda v: [str(v)]),
    "Fraction": (fractions.Fraction, lambda v: [v.numerator, v.denominator]),
    "datetime": (
        datetime.datetime,
        lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo],
    ),
    "date": (datetime.date, lambda v: [v.year, v.month, v.day]),
    "time": (datetime.time, lambda v: [v.hour, v.minute, v.second, v.microsecond]),
    "timedelta": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds]),
    "timezone": (datetime.timezone, lambda v: [v.utcoffset(None)]),
    "ZoneInfo": (zoneinfo.ZoneInfo, lambda v: [v.key]),
    "Pattern": (re.Pattern, lambda v: [v.pattern, v.flags & ~re.DEBUG]),
}
_MAKERS: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in _CONSTRUCTORS.items()} | {
    "Pattern": re.compile
}
_NAME_OF_TYPE = {kind: name for name, (kind, _) in _CONSTRUCTORS.items()}
_MAPPINGS = {"Counter": collections.Counter, "OrderedDict": collections.OrderedDict, "defaultdict": dict}
_CONTAINERS = (list, tuple, dict, set, bytearray, collections.deque)
# Instances of subclasses cross as instances of the first of these.
_BASES = (*(int, float, str, list, dict, tuple, set, frozenset, bytes, bytearray),)


def pack(value: Any, reference: Callable[[Any], Any]) -> Any:
    """Return a value as JSON values.

    Args:
        value: any value.
        reference: function that packs what is not data.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is int:
        return value if -_MAX_JSON_INT < value < _MAX_JSON_INT else ["int", hex(value)]
    if kind is list:
        return ["list", [item if type(item) in PLAIN else pack(item, reference) for item in value]]
    if kind is dict:
        return ["dict", [[pack(k, reference), pack(v, reference)] for k, v in value.items()]]
    if kind in (bytes, bytearray):
        return [kind.__name__, base64.b64encode(value).decode()]
    if kind in _NAME_OF_TYPE:
        name = _NAME_OF_TYPE[kind]
        return ["new", name, [pack(part, reference) for part in _CONSTRUCTORS[name][1](value)]]
    if isinstance(value, Enum):
        return reference(value)
    if _is_numpy(value):
        return reference(value) if value.dtype.hasobject else _pack_array(value)
    return _pack_subclass(kind, value, reference)


def _pack_subclass(kind: Any, value: Any, reference: Callable[[Any], Any]) -> Any:
    if kind.__name__ in _MAPPINGS and isinstance(value, dict):
        items = [[pack(k, reference), pack(v, reference)] for k, v in dict.items(value)]
        return ["mapping", kind.__name__, items]
    if is_named_tuple(kind):
        return ["named", kind.__name__, list(kind._fields), [pack(item, reference) for item in value]]
    if isinstance(value, type({}.keys()) | type({}.values()) | type({}.items())):
        return pack(list(value), reference)
    base: Any = next((b for b in _BASES if isinstance(value, b)), None)
    if base is not None:
        return pack(base(value), reference)
    if isinstance(value, Real) and kind.__module__ != "solution":
        return pack(int(value) if isinstance(value, Integral) else float(value), reference)
    return _pack_builtin_type(value) or reference(value)


def _pack_builtin_type(value: Any) -> list[Any] | None:
    if type(value) is type and value.__module__ == "builtins" and not issubclass(value, BaseException):
        return ["type", value.__name__]
    return None


def _is_numpy(value: Any) -> bool:
    return "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray | sys.modules["numpy"].generic)


def _pack_array(value: Any) -> list[Any]:
    array = sys.modules["numpy"].ascontiguousarray(value)
    return ["array", array.dtype.str, list(value.shape), base64.b64encode(array.tobytes()).decode()]


def unpack(value: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """Return the copy of a packed value.

    Args:
        value: result of `pack`.
        resolve: function that unpacks results of `reference`.
    """
    if not isinstance(value, list):
        return value
    kind, first, *rest = value
    if kind == "list":
        return [unpack(item, resolve) if isinstance(item, list) else item for item in first]
    if kind == "dict":
        return {unpack(k, resolve): unpack(v, resolve) for k, v in first}
    if kind == "int":
        return int(first, 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray)(base64.b64decode(first))
    if kind == "new":
        return _MAKERS[first](*(unpack(part, resolve) for part in rest[0]))
    if kind == "mapping":
        return _MAPPINGS[first]({unpack(k, resolve): unpack(v, resolve) for k, v in rest[0]})
    if kind == "named":
        return named_tuple(first, tuple(rest[0]))(*(unpack(item, resolve) for item in rest[1]))
    if kind == "type":
        return _builtin_type(first)
    if kind == "array":
        flat = sys.modules["numpy"].frombuffer(base64.b64decode(rest[1]), dtype=first)
        return flat.reshape(rest[0]).copy() if rest[0] else flat[0]
    return resolve(value)


def _builtin_type(name: str) -> type:
    kind = vars(builtins)[name]
    if not isinstance(kind, type):
        raise TypeError(f"{name} is no type")
    return kind


def is_named_tuple(kind: Any) -> bool:
    """Return whether a class was made by `namedtuple` or `NamedTuple`."""
    return isinstance(kind, type) and issubclass(kind, tuple) and "_fields" in vars(kind) and "_make" in vars(kind)


@cache
def named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """Return the class of named tuples with this name and these fields."""
    return collections.namedtuple(name, fields)


def assign(old: Any, new: Any) -> None:
    """Assign the contents of a container to another in place, including nested containers of the same type."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        pairs = [_merge(before, after) for before, after in zip(old, new, strict=False)]
        if isinstance(old, list):
            old[:] = [*pairs, *new[len(pairs) :]]
    elif isinstance(old, dict) and isinstance(new, dict):
        merged = {key: _merge(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray | collections.deque):
        old.clear()
        old.extend(new)
    elif dataclasses.is_dataclass(old):
        for name, value in vars(new).items():
            object.__setattr__(old, name, _merge(vars(old).get(name), value))
    else:
        _assign_array(old, new)


def _assign_array(old: Any, new: Any) -> None:
    if _is_numpy(old) and old.shape:
        old[...] = new


def _merge(before: Any, after: Any) -> Any:
    """Return the old container with the new contents, or the new value."""
    if type(before) is not type(after) or not (isinstance(before, _CONTAINERS) or dataclasses.is_dataclass(before)):
        return after
    assign(before, after)
    return before
