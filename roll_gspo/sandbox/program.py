"""The process that runs model-written code, already without rights; it ends with `os._exit`."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import json
import numbers
import os
import shutil
import socket
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import KeysView, ValuesView
from types import CodeType
from typing import Any, NoReturn

from roll_gspo.sandbox import exam, peer

# What LiveCodeBench and ROLL put before every program: solutions rely on it. The built-in names come last, since
# `math.pow` or `operator.abs` must not hide them.
_PREAMBLE = "\n".join(
    [
        *(
            f"from {name} import *"
            for name in (
                *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
                *("statistics", "itertools", "functools", "operator", "io", "json", "typing", "builtins"),
            )
        ),
        "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools",
        "import functools, operator, io, sys, json, typing",
    ]
)
_RECURSION_LIMIT = 50_000
_names: dict[str, Any] = {}


def prepare() -> None:
    """Make the names that every program starts with."""
    exec(_PREAMBLE, _names)
    for name in [n for n in _names if n.startswith("__")]:
        del _names[name]


def run(header: dict[str, Any], body: bytes, code: CodeType | None, descriptor: int | None) -> NoReturn:
    """Run one case.

    Args:
        header: `do` is `stdin` (a program), `call` (a function of it), `serve` (its names, to an exam) or `exam`.
        body: of the case.
        code: of the program.
        descriptor: of the connection between the last two.
    """
    for name in [n for n in sys.modules if n.partition(".")[0] == "roll_gspo"]:
        del sys.modules[name]
    sys.setrecursionlimit(_RECURSION_LIMIT)
    if code is not None:
        builtins.__dict__.update(_names)  # not its globals: `merge` must not seem to be its own
    status = 1
    try:
        if header["do"] == "exam":
            result = _take_stdout()
            _answer(result, exam.run(json.loads(body), _names, descriptor))
            status = 0
        else:
            assert code is not None
            status = {"stdin": _run_program, "call": _call, "serve": _serve}[header["do"]](
                header, body, code, descriptor
            )
    except SystemExit as exit_:
        status = _exit_status(exit_)
    except BaseException:
        _show_error()
    _finish(status)


def _run_program(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    exec(code, _module("__main__"))
    return 0


def _call(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    """The returned value as JSON on what was stdout; what the program prints goes nowhere."""
    result = _take_stdout()
    names = _module("solution")
    exec(code, names)
    _answer(result, _function(names, header["function"])(*json.loads(body)))
    return 0


def _take_stdout() -> int:
    """A descriptor of what was stdout, for the answer alone."""
    result = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return result


def _answer(descriptor: int, value: Any) -> None:
    with open(descriptor, "wb") as file:
        file.write(json.dumps(value, default=_plain).encode())


def _serve(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    names = _module("solution")
    exec(code, names)
    own = {k: v for k, v in names.items() if not k.startswith("__")}
    assert descriptor is not None
    peer.serve(socket.socket(fileno=descriptor), own)
    return 0


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__["__builtins__"] = builtins
    return module.__dict__


def _function(names: dict[str, Any], name: str) -> Any:
    """A function of that name, or the method of `Solution`, as on LeetCode; `names` are the program's own."""
    if name in names:
        return names[name]
    if "Solution" in names:
        return getattr(names["Solution"](), name)
    raise NameError(f"the program defines no {name}")


def _plain(value: Any) -> Any:
    """For JSON: iterables other than lists as lists, numbers of other types as int and float."""
    if isinstance(value, tuple | set | frozenset | range | map | filter | zip | deque | KeysView | ValuesView):
        return list(value)
    if isinstance(value, numbers.Real):  # of numpy
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError(f"it returned a {type(value).__name__}, which no test case expects")


def _exit_status(exit_: SystemExit) -> int:
    if exit_.code is None or isinstance(exit_.code, int):
        return (exit_.code or 0) & 0xFF
    print(exit_.code, file=sys.stderr)
    return 1


def _show_error() -> None:
    with contextlib.suppress(BaseException):
        kind, error, trace = sys.exc_info()
        traceback.print_exception(kind, error, trace and trace.tb_next, limit=-5)


def _finish(status: int) -> NoReturn:
    """End as an interpreter does: threads, exit handlers, what is still to be written."""
    try:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
    finally:
        os._exit(status)


def empty_folder(path: str) -> None:
    """Remove what is in a folder, without following links."""
    for entry in os.scandir(path):
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
