"""Exceptions, enumerations and records of the program, which become local classes of the unit tests.

The program describes such a class before the tests run, and the tests make a class from the description. Its instances
are data: they are compared without the program, so that the program cannot decide whether they are equal.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import enum
import inspect
import keyword
from collections.abc import Callable, Sequence
from typing import Any

_ENUM_BASES = {kind.__name__: kind for kind in (enum.IntFlag, enum.Flag, enum.IntEnum, enum.StrEnum, enum.Enum)}
_GENERATED = ("<string>", dataclasses.__file__)  # files of the methods that `dataclass` adds
_TEXT = "@text"


def describe_enum(kind: Any, pack: Callable[[Any], Any]) -> list[Any]:
    """Return the description of an enumeration, for `make_enum`."""
    base = next(name for name, base in _ENUM_BASES.items() if issubclass(kind, base))
    return [kind.__name__, base, [[name, pack(member.value)] for name, member in kind.__members__.items()]]


def make_enum(name: str, base: str, members: Sequence[Any], unpack: Callable[[Any], Any]) -> Any:
    """Make an enumeration from its description."""
    functional: Any = _ENUM_BASES[base]
    return functional(name, [(str(member), unpack(value)) for member, value in members])


def is_record(kind: Any) -> bool:
    """Return whether a class is a dataclass that only holds fields: it defines no methods, and all fields count."""
    if kind.__bases__ != (object,) or not dataclasses.is_dataclass(kind) or "__slots__" in vars(kind):
        return False
    attributes = [value for name, value in vars(kind).items() if name not in ("__weakref__", "__dict__")]
    methods = [value for value in attributes if inspect.isroutine(value) or isinstance(value, property)]
    generated = all(
        inspect.isfunction(method) and inspect.unwrap(method).__code__.co_filename in _GENERATED
        for method in methods
        if not inspect.ismemberdescriptor(method)
    )
    fields = dataclasses.fields(kind)
    return generated and "__eq__" in vars(kind) and all(f.init and f.compare and not f.kw_only for f in fields)


def describe_record(kind: Any, pack: Callable[[Any], Any]) -> list[Any]:
    """Return the description of a record, for `make_record`."""
    fields = []
    for field in dataclasses.fields(kind):
        default: list[Any] = []
        if field.default is not dataclasses.MISSING:
            default = [pack(field.default)]
        elif field.default_factory is not dataclasses.MISSING:
            default = [pack(field.default_factory())]
        fields.append([field.name, default])
    parameters = kind.__dataclass_params__
    return [kind.__name__, fields, bool(parameters.frozen), bool(parameters.order)]


def make_record(
    name: str, fields: Sequence[Any], frozen: bool, order: bool, unpack: Callable[[Any], Any]
) -> type[object]:
    """Make a dataclass from its description."""
    made: list[Any] = []
    for field, default in fields:
        if default:
            value = unpack(default[0])
            made.append((field, Any, dataclasses.field(default_factory=lambda value=value: copy.deepcopy(value))))
        else:
            made.append((field, Any))
    return dataclasses.make_dataclass(name, made, frozen=bool(frozen), order=bool(order))


def record_values(record: Any) -> list[Any]:
    """Return the values of the fields of a record."""
    return [vars(record)[field.name] for field in dataclasses.fields(record)]


class ExceptionClass(type):
    """Metaclass of exceptions of the peer.

    Attributes:
        construct: function that makes an instance where the class is defined; None to make it here.
    """

    construct: Callable[..., Any] | None = None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.construct(*args, **kwargs) if cls.construct else super().__call__(*args, **kwargs)


def make_exception_class(name: str, bases: Sequence[type[BaseException]]) -> type[BaseException]:
    """Make an exception class; without bases, return the built-in exception of that name."""
    if not bases:
        known = vars(builtins).get(name)
        return known if inspect.isclass(known) and issubclass(known, BaseException) else Exception
    if not name.isidentifier() or keyword.iskeyword(name):
        name = "UnnamedError"

    def text(self: Any) -> str:
        return vars(self)[_TEXT] if _TEXT in vars(self) else bases[0].__str__(self)

    return ExceptionClass(name, tuple(bases), {"__str__": text, "construct": None})


def make_exception(kind: Any, args: Sequence[Any], attributes: Any, text: str) -> BaseException:
    """Make an exception with arguments, attributes and text."""
    new: Callable[..., Any] = kind.__new__
    try:
        error = new(kind, *args) if isinstance(kind, ExceptionClass) else kind(*args)
    except Exception:  # the class wants other arguments
        error = new(kind)
        error.args = tuple(args)
    if not isinstance(error, BaseException):
        raise TypeError("the other process has raised an object that is no exception")
    for name, value in attributes.items():
        if not name.startswith("_"):
            setattr(error, name, value)
    error.__dict__[_TEXT] = str(text)
    return error
