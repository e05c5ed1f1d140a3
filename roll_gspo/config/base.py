"""Base class and common types of the configuration blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from roll_gspo.printable import printable_line

MAX_NAME_BYTES = 200  # file systems allow 255; files beside the folder have longer names
MAX_DEVICES = 2**16  # protects the memory from a typo such as range(0, 80000000000)


class Problem(NamedTuple):
    """A rule between keys that a configuration breaks, or a warning about a key.

    Attributes:
        key: the dotted key to look at, relative to the block whose rule it is.
        message: what is wrong with its value and what to do. It does not repeat the key.
        also: further keys that the rule reads. The error points to one of them if `key` is written nowhere, or if
            only they are set on the command line.
    """

    key: str
    message: str
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class BrokenRules(ValueError):
    """The broken rules of one block; pydantic wraps it in a `ValidationError`."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def used_only_with(key: str, reader: str, values: str = "") -> Problem:
    """Return the problem of a key that is set although nothing reads it.

    Args:
        key: the key without effect.
        reader: the key that decides whether `key` is read.
        values: the values of `reader` for which it is; omitted if any value but null is.
    """
    condition = f"{reader}: {values}" if values else reader
    return Problem(key, f"is used only with {condition}; set that, or remove this key", (reader,))


class Schema(BaseModel):
    """One YAML block. Unknown keys are errors, types are not coerced, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the composed keys of this block plus the defaults that depend on other keys."""
        return values

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        return cls.fill_defaults(dict(values)) if isinstance(values, Mapping) else values

    def broken_rules(self) -> Iterator[Problem]:
        """Yield the rules between the keys of this block that its values break."""
        yield from ()

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        if broken := list(self.broken_rules()):
            raise BrokenRules(broken)
        return self


def parse_device_mapping(value: Any) -> tuple[int, ...] | None:
    """Parse ROLL's notations of devices without evaluating code.

    Accepts `list(range(0, 8))`, `range(0, 8)`, `[0, 1, 2]` (list or string), `"0-7"`, `"0,2,4"`, or null for one worker
    on the default device.
    """
    if value is None or isinstance(value, tuple):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        devices = tuple(value)
    elif isinstance(value, str):
        devices = _devices_of_text(value)
    else:
        raise ValueError(_EXPECTED_DEVICES.format(value=value))
    if not devices or len(set(devices)) != len(devices) or min(devices) < 0:
        raise ValueError(_EXPECTED_DEVICES.format(value=value))
    return devices


_EXPECTED_DEVICES = "expected device numbers such as '0-7', [0, 1, 2] or list(range(0, 8)), got {value!r}"


def _devices_of_text(text: str) -> tuple[int, ...]:
    compact = re.sub(r"\s", "", text)
    inner = re.sub(r"^list\((.*)\)$", r"\1", compact)
    inner = re.sub(r"^\[(.*)\]$", r"\1", inner)
    if match := re.fullmatch(r"range\((?:(\d+),)?(\d+)\)", inner):
        return tuple(_span(int(match[1] or 0), int(match[2]), text))
    devices: list[int] = []
    for part in inner.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(_EXPECTED_DEVICES.format(value=text))
        devices.extend(_span(int(match[1]), int(match[2] or match[1]) + 1, text))
    return tuple(devices)


def _span(start: int, end: int, text: str) -> range:
    if end > MAX_DEVICES:
        raise ValueError(f"device numbers are below {MAX_DEVICES}, got {text!r}")
    return range(start, end)


DeviceMapping = Annotated[tuple[int, ...] | None, BeforeValidator(parse_device_mapping)]


def parse_names(value: Any) -> tuple[str, ...]:
    """Convert a string or a list of strings to a tuple."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a string or a list of strings, got {value!r}")
    return tuple(names)


Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]


def _one_folder(name: str) -> str:
    """Check that `name` names one folder inside another."""
    if name in ("", ".", "..") or "/" in name or name != printable_line(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"expected the name of one folder, without '/' and control characters, got {name!r}")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]
