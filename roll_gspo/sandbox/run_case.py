"""Execution of one case in the confined process, which ends with `os._exit`."""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import contextlib
import json
import numbers
import os
import socket
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import KeysView, ValuesView
from types import CodeType
from typing import Any, NoReturn

from roll_gspo.sandbox import rpc, unit_tests, values

# LiveCodeBench and ROLL put these imports before every program, and solutions rely on them. `builtins` comes last, so
# that `math.pow` or `operator.abs` do not hide built-in names.
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
_MODULES_OF_PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
_RECURSION_LIMIT = 50_000
_names: dict[str, Any] = {}


def prepare() -> None:
    """Import the names that every program can use."""
    exec(_PREAMBLE, _names)
    for name in [n for n in _names if n.startswith("__")]:
        del _names[name]
    for name in ("exit", "quit"):  # which `site` adds
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    unit_tests.warm_up()


def run_case(header: dict[str, Any], body: bytes, code: CodeType | None, descriptor: int | None) -> NoReturn:
    """Run one case and exit.

    Args:
        header: its `do` is `stdin` (run the program), `call` (call a function of the program), `serve` (serve the names
            of the program to unit tests) or `tests` (run unit tests).
        body: body of the message.
        code: compiled program.
        descriptor: socket that connects `serve` and `tests`.
    """
    runs_tests = header["do"] == "tests"
    hidden = ("roll_gspo",) if runs_tests else ("roll_gspo", *_MODULES_OF_PYTEST)
    for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
        del sys.modules[name]
    sys.setrecursionlimit(_RECURSION_LIMIT)
    sys.set_int_max_str_digits(0)
    if not runs_tests:
        builtins.__dict__.update(_names)  # not into globals, where e.g. `merge` would look like a name of the program
    status = 1
    try:
        if runs_tests:
            result = _redirect_stdout()
            _write_result(result, unit_tests.run_tests(json.loads(body), _names, descriptor))
            status = 0
        else:
            assert code is not None
            status = {"stdin": _run_program, "call": _call, "serve": _serve}[header["do"]](
                header, body, code, descriptor
            )
    except SystemExit as exit_:
        status = _exit_status(exit_)
    except BaseException:
        _print_error()
    _finish(status)


def _run_program(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    exec(code, _module("__main__"))
    return 0


def _call(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    """Write the returned value as JSON to stdout; the output of the program is discarded."""
    result = _redirect_stdout()
    arguments = values.unpack(json.loads(body), list)
    names = _module("solution")
    exec(code, names)
    _write_result(result, _function(names, header["function"])(*arguments))
    return 0


def _redirect_stdout() -> int:
    """Redirect stdout to /dev/null, and return a descriptor of the original stdout for the result."""
    result = os.dup(1)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 1)
    return result


def _write_result(descriptor: int, value: Any) -> None:
    with open(descriptor, "wb") as file:
        file.write(json.dumps(value, default=_to_json).encode())


def _serve(header: dict[str, Any], body: bytes, code: CodeType, descriptor: int | None) -> int:
    names = _module("solution")
    exec(code, names)
    public = {k: v for k, v in names.items() if not k.startswith("__")}
    assert descriptor is not None
    rpc.serve(socket.socket(fileno=descriptor), public)
    return 0


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__["__builtins__"] = builtins
    return module.__dict__


def _function(names: dict[str, Any], name: str) -> Any:
    """Return the function with that name, or the method of `Solution` as on LeetCode."""
    if name in names:
        return names[name]
    if "Solution" in names:
        return getattr(names["Solution"](), name)
    raise NameError(f"the program defines no {name}")


def _to_json(value: Any) -> Any:
    """Convert iterables to lists and other numbers to int or float."""
    if isinstance(value, tuple | set | frozenset | range | map | filter | zip | deque | KeysView | ValuesView):
        return list(value)
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic | sys.modules["numpy"].ndarray):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError(f"the function returned a {type(value).__name__}, which cannot be compared with a test case")


def _exit_status(exit_: SystemExit) -> int:
    """Return the status of `sys.exit`; a message is printed."""
    if exit_.code is None or isinstance(exit_.code, int):
        return (exit_.code or 0) & 0xFF
    print(exit_.code, file=sys.stderr)
    return 1


def _print_error() -> None:
    with contextlib.suppress(BaseException):
        kind, error, trace = sys.exc_info()
        traceback.print_exception(kind, error, trace and trace.tb_next, limit=-5)


def _finish(status: int) -> NoReturn:
    """Exit like an interpreter: wait for threads, run exit handlers, flush the streams."""
    try:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
    finally:
        os._exit(status)
