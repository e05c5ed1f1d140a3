"""Sandboxes as the process outside sees them: it starts, feeds, times and ends them."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roll_gspo.errors import MissingDependencyError, RollGspoError
from roll_gspo.sandbox import frames, seccomp
from roll_gspo.sandbox.limits import Limits, Outcome
from roll_gspo.sandbox.room import PACKAGES

logger = logging.getLogger(__name__)

_BOOT = (
    "import sys; sys.path.append(sys.argv[3]); "
    "from roll_gspo.sandbox.zygote import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
_START_S = 60.0
_COMMAND_S = 30.0
_GRACE_S = 1.0  # beyond the runner's own clock
_MODULES = (
    *(
        "array",
        "ast",
        "bisect",
        "calendar",
        "cmath",
        "collections.abc",
        "contextlib",
        "copy",
        "dataclasses",
        "datetime",
    ),
    *("decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "locale"),
    *("math", "numbers", "operator", "pprint", "queue", "random", "re", "statistics", "string", "struct", "textwrap"),
    *("threading", "time", "traceback", "types", "typing", "unittest.mock", "encodings.idna", "encodings.latin_1"),
)


_REMEDY = (
    "allow user namespaces (sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone and "
    "kernel.apparmor_restrict_unprivileged_userns; in a container its seccomp profile, or CAP_SYS_ADMIN), or set "
    "allow_unsafe: true"
)
_WHAT_HOLDS = (
    "allow_unsafe: programs run all the same. They can read the files of this user and write into its folders; only "
    "limits of time, memory and output, their process group and, if the kernel has it, a filter of system calls hold"
)


class SandboxError(RollGspoError):
    """This host cannot isolate programs, or a sandbox does not answer; the message says what is missing."""


class Sandbox:
    """Runs Python programs one at a time (or two that talk to each other) without access to anything.

    Args:
        limits: of each program.
        packages: import names of installed packages that programs may import beside the standard library.
        allow_unsafe: where the host offers no isolation, run with limits alone instead of refusing.

    Raises:
        SandboxError: the host offers no isolation.
        MissingDependencyError: a package is not installed.
    """

    def __init__(self, limits: Limits | None = None, packages: Sequence[str] = (), allow_unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self._packages = _places(packages)
        self.isolated = True
        try:
            self._zygote = _Zygote(self.limits, self._packages, isolated=True)
        except SandboxError as error:
            if not allow_unsafe:
                raise
            self.isolated = False
            self._zygote = _Zygote(self.limits, self._packages, isolated=False)
            logger.warning("%s\n%s", error, _WHAT_HOLDS)

    def start(self, source: str) -> Program:
        """Start a program's sandbox; close it when done."""
        try:
            return Program(self._zygote, self.limits, source)
        except (EOFError, OSError):  # it was killed from outside: once more, with a new one
            self._zygote.close()
            self._zygote = _Zygote(self.limits, self._packages, self.isolated)
            return Program(self._zygote, self.limits, source)

    def close(self) -> None:
        """End the processes; the sandbox cannot be used afterwards."""
        self._zygote.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Zygote:
    """The process that programs are forked from."""

    def __init__(self, limits: Limits, packages: Sequence[tuple[str, str]], isolated: bool) -> None:
        if isolated and not (sys.platform == "linux" and seccomp.supported()):
            raise SandboxError("sandbox: needs Linux on x86_64 or aarch64")
        self.isolated = isolated
        self._control, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(Path(__file__).parents[2])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", _BOOT, *arguments],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
            )
        self._finalizer = weakref.finalize(self, _end, self._control, self._process, os.getpid())
        self._control.settimeout(_START_S)
        try:
            frames.send(self._control, _setup(limits, packages, isolated))
            answer = frames.receive(self._control)[0]
        except (EOFError, OSError) as error:
            self.close()
            raise SandboxError(f"sandbox: its first process did not start ({type(error).__name__} {error})") from None
        self._control.settimeout(_COMMAND_S)
        if "problem" in answer:
            self.close()
            raise SandboxError(f"sandbox: this host does not let us isolate programs ({answer['problem']}); {_REMEDY}")

    def ask(self, command: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        try:
            frames.send(self._control, command, descriptors=descriptors)
            answer = frames.receive(self._control)[0]
        except (EOFError, OSError):  # an answer that is late must not be taken for the next one's
            self.close()
            raise
        if "problem" in answer:
            raise SandboxError(f"sandbox: a program's namespaces cannot be made ({answer['problem']})")
        return answer

    def close(self) -> None:
        """End it, and with it all programs."""
        self._finalizer()


def _end(control: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of that process must not end its sandbox
        return
    control.close()
    try:
        process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=_COMMAND_S)


class Program:
    """One program in its sandbox.

    Attributes:
        problem: why it does not compile, "" where it does.
    """

    def __init__(self, zygote: _Zygote, limits: Limits, source: str) -> None:
        self._zygote, self._limits, self._source = zygote, limits, source
        self._folder: str | None = None
        self._open()

    def _open(self) -> None:
        if not self._zygote.isolated:
            self._folder = tempfile.mkdtemp(prefix="sandbox")
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._id = self._zygote.ask({"do": "start", "folder": self._folder}, [theirs.fileno()])["id"]
        self._lost = False
        wall_s = self._begin({"do": "load"}, self._source.encode("utf-8", "replace"), None)
        answer = self._receive(time.monotonic() + wall_s + _GRACE_S)
        self.problem = str(answer[0].get("problem", "")) if answer else "compiling it ended its sandbox"

    def run(self, stdin: str, wall_s: float | None = None) -> Outcome:
        """Run it as a script.

        Args:
            stdin: what it reads.
            wall_s: seconds by the clock, at most those of the limits.
        """
        return self._case({"do": "stdin"}, stdin.encode("utf-8", "replace"), wall_s)

    def call(self, function: str, arguments: Sequence[Any], wall_s: float | None = None) -> Outcome:
        """Call one of its functions (or a method of its `Solution`); `stdout` is what it returned, as JSON."""
        return self._case({"do": "call", "function": function}, json.dumps(list(arguments)).encode(), wall_s)

    def examine(
        self, examiner: Program, sources: Sequence[str], entry_point: str = "", wall_s: float | None = None
    ) -> Outcome:
        """Run unit tests on it.

        Args:
            examiner: a program of the same sandbox, "" by its source, that the tests run in.
            sources: of the tests: assertions, pytest functions, or a `check(candidate)`.
            entry_point: the function that `check` is given, "" for other tests.
            wall_s: as in `run`.

        Returns:
            The examiner's outcome, `stdout` as `exam.run` returns it, as JSON.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            wall_s = self._begin({"do": "serve"}, b"", wall_s, [theirs.fileno()])
            job = json.dumps({"sources": list(sources), "entry_point": entry_point})
            examiner._begin({"do": "exam"}, job.encode(), wall_s, [ours.fileno()])
        return examiner._finish(wall_s)

    def examine_alone(self, sources: Sequence[str], wall_s: float | None = None) -> Outcome:
        """Run unit tests that need no program in this one."""
        job = json.dumps({"sources": list(sources), "entry_point": ""})
        return self._case({"do": "exam"}, job.encode(), wall_s)

    def _case(self, header: dict[str, Any], body: bytes, wall_s: float | None) -> Outcome:
        return self._finish(self._begin(header, body, wall_s))

    def _begin(
        self, header: dict[str, Any], body: bytes, wall_s: float | None, descriptors: Sequence[int] = ()
    ) -> float:
        if self._lost:  # an answer that is late must not be taken for the next one's
            self.close()
            self._open()
        wall_s = min(wall_s or self._limits.wall_s, self._limits.wall_s)
        self._connection.settimeout(wall_s + _GRACE_S)
        with contextlib.suppress(OSError):  # `_finish` will find out
            frames.send(self._connection, {**header, "wall_s": wall_s}, body, descriptors)
        return wall_s

    def _finish(self, wall_s: float) -> Outcome:
        deadline = time.monotonic() + wall_s + _GRACE_S
        answer = self._receive(deadline)
        return _outcome(*answer) if answer else Outcome("lost", -signal.SIGKILL, "", "")

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes] | None:
        most = (self._limits.output_kb + 2 * 1024) << 10
        try:
            return frames.receive(self._connection, max_body=most, deadline=deadline)[:2]
        except (EOFError, OSError, frames.BadFrameError):
            self._lost = True
            return None

    def close(self) -> None:
        """End it and all that it started; none is left when this returns."""
        self._connection.close()
        with contextlib.suppress(EOFError, OSError):  # a zygote that is gone has taken it along
            self._zygote.ask({"do": "end", "id": self._id})
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _outcome(header: dict[str, Any], body: bytes) -> Outcome:
    """Of what the runner says, which may be anything."""
    status, code, length = (header.get(name) for name in ("status", "exit_code", "stdout"))
    if status not in ("finished", "timeout", "output") or not isinstance(code, int) or not isinstance(length, int):
        return Outcome("lost", -signal.SIGKILL, "", "")
    stdout, stderr = body[: max(0, length)], body[max(0, length) :]
    return Outcome(status, code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


def _environment() -> dict[str, str]:
    """Of the zygote; programs get the part without the last line."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    libraries = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    return {
        **{"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"},
        **{"MALLOC_ARENA_MAX": "1", **threads, **libraries},
    }


def _setup(limits: Limits, packages: Sequence[tuple[str, str]], isolated: bool) -> dict[str, Any]:
    stdlib = [os.path.dirname(os.path.realpath(os.__file__)), os.path.realpath(sysconfig.get_config_var("DESTSHARED"))]
    parents = [PACKAGES] if isolated else list(dict.fromkeys(os.path.dirname(place) for place, _ in packages))
    return {
        "limits": vars(limits),
        "isolated": isolated,
        "modules": _MODULES,
        "environment": {k: v for k, v in _environment().items() if k != "LD_LIBRARY_PATH"},
        "executable": os.path.realpath(sys.executable),
        "path": [*stdlib, *parents] if packages else stdlib,
        "packages": [name for _, name in packages if "." not in name],
        "contents": _contents(stdlib, packages),
    }


def _contents(stdlib: Sequence[str], packages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """See `room.Contents`: the interpreter, its library and what these are linked with."""
    links = [(path, os.readlink(path)) for path in ("/lib", "/lib64", "/lib32") if os.path.islink(path)]
    of_machine = [f"{folder}/{sysconfig.get_config_var('MULTIARCH')}" for folder in ("/usr/lib", "/lib")]
    libraries = of_machine if os.path.isdir(of_machine[0]) else ["/usr/lib", "/lib"]
    own = () if sys.base_prefix == "/usr" else (os.path.join(sys.base_prefix, "lib"),)
    wanted = {
        *(*libraries, "/usr/lib64", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
        *(*own, *stdlib, os.path.realpath(sys.executable)),
    }
    present = sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})
    folders = [path for path in present if not any(path.startswith(other + "/") for other in present)]
    if misplaced := [path for path in folders if path.startswith("/tmp/")]:
        raise SandboxError(f"sandbox: Python lies in {misplaced[0]}, and programs get a /tmp of their own; move it")
    patterns = [
        f"{folder}{deep}/{kind}-packages"
        for folder in folders
        for deep in ("", "/python3*")
        for kind in ("site", "dist")
    ]
    hidden = sorted(
        {os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)}
    )
    return {"folders": folders, "hidden": hidden, "links": links, "packages": list(packages)}


def _places(packages: Sequence[str]) -> list[tuple[str, str]]:
    """(path, name) of packages, and of the shared libraries that wheels put beside them."""
    places = []
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                f"sandbox: no package '{name}' to give programs: pip install {name}", name=name
            )
        origin = os.path.realpath(spec.origin)
        place = os.path.dirname(origin) if spec.submodule_search_locations else origin
        places.append((place, os.path.basename(place)))
        libraries = f"{place}.libs"
        if os.path.isdir(libraries):
            places.append((libraries, os.path.basename(libraries)))
    return places
