"""Sandboxes from the outside: starting programs, running cases with a time limit, and killing programs."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roll_gspo.errors import MissingDependencyError, RollGspoError
from roll_gspo.sandbox import folders, messages, seccomp, values
from roll_gspo.sandbox.limits import Limits, Outcome
from roll_gspo.sandbox.namespaces import PACKAGES

logger = logging.getLogger(__name__)

# Paths come through stdin, because programs can read the command line.
_LAUNCH_CODE = (
    "import json, sys; sys.path.extend(json.loads(sys.stdin.readline())); "
    "from roll_gspo.sandbox.fork_server import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
_TEST_LIBRARIES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_START_TIMEOUT_S = 60.0
_COMMAND_TIMEOUT_S = 30.0
_MIN_WALL_S = 0.05
_GRACE_S = 1.0  # in addition to the time limit that the runner enforces
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
_UNSAFE_WARNING = (
    "allow_unsafe: programs run without isolation and can read and write the files of this user; only limits of time, "
    "memory and output, a process group and, if the kernel supports it, a system call filter apply"
)


class SandboxError(RollGspoError):
    """The host cannot isolate programs, or a sandbox does not answer."""


class Sandbox:
    """Runs untrusted Python programs without access to files, network, environment and other processes.

    Args:
        limits: resource limits of each program.
        packages: names of installed packages that programs may import besides the standard library.
        allow_unsafe: if True, programs run with limits only on a host that does not support isolation.

    Raises:
        SandboxError: the host does not support isolation.
        MissingDependencyError: a package is not installed.
    """

    def __init__(self, limits: Limits | None = None, packages: Sequence[str] = (), allow_unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self._packages = _package_paths(packages)
        self.isolated = True
        try:
            self._server = _ForkServer(self.limits, self._packages, isolated=True)
        except SandboxError as error:
            if not allow_unsafe:
                raise
            self.isolated = False
            self._server = _ForkServer(self.limits, self._packages, isolated=False)
            logger.warning("%s\n%s", error, _UNSAFE_WARNING)

    def start(self, source: str, wall_s: float | None = None) -> Program:
        """Start a program, which must be closed after use.

        Args:
            source: source code of the program.
            wall_s: seconds by the clock for compiling it, if lower than the limit.
        """
        try:
            return Program(self._server, self.limits, source, wall_s)
        except (EOFError, OSError):  # the fork server was killed from outside: retry with a new one
            self._server.close()
            self._server = _ForkServer(self.limits, self._packages, self.isolated)
            return Program(self._server, self.limits, source, wall_s)

    def close(self) -> None:
        """Kill all processes. The sandbox cannot be used afterwards."""
        self._server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ForkServer:
    """Handle of the fork server process."""

    def __init__(self, limits: Limits, packages: Sequence[tuple[str, str]], isolated: bool) -> None:
        if isolated and not (sys.platform == "linux" and seccomp.is_supported()):
            raise SandboxError("sandbox: needs Linux on x86_64 or aarch64")
        self.isolated = isolated
        self._requesting = threading.Lock()
        self._control, child_end = socket.socketpair()
        interpreter = os.path.realpath(sys.executable)  # of no virtual environment, whose path programs could read
        paths = [str(Path(__file__).parents[2]), *_library_folders()]
        arguments = [str(child_end.fileno()), str(os.getpid())]
        with child_end:
            self._process = subprocess.Popen(
                [interpreter, "-S", "-s", "-P", "-B", "-c", _LAUNCH_CODE, *arguments],
                pass_fds=(child_end.fileno(),),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps(paths).encode())
        self._finalizer = weakref.finalize(self, _stop, self._control, self._process, os.getpid())
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            messages.send(self._control, _setup(limits, packages, isolated))
            answer = messages.receive(self._control)[0]
        except (EOFError, OSError) as error:
            self.close()
            raise SandboxError(f"sandbox: the fork server did not start ({type(error).__name__} {error})") from None
        self._control.settimeout(_COMMAND_TIMEOUT_S)
        if "problem" in answer:
            self.close()
            raise SandboxError(f"sandbox: this host cannot isolate programs ({answer['problem']}); {_REMEDY}")

    def request(self, command: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Send a command and return the answer. Threads take turns."""
        try:
            with self._requesting:
                messages.send(self._control, command, descriptors=descriptors)
                answer = messages.receive(self._control)[0]
        except (EOFError, OSError):  # a late answer must not be read as the answer to the next command
            self.close()
            raise
        if "problem" in answer:
            raise SandboxError(f"sandbox: the namespaces of a program cannot be created ({answer['problem']})")
        return answer

    def close(self) -> None:
        """End the fork server and all programs."""
        self._finalizer()


def _stop(control: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner must not end the owner's sandbox
        return
    control.close()
    try:
        process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=_COMMAND_TIMEOUT_S)


class Program:
    """One program in the sandbox.

    Attributes:
        problem: reason why the program does not compile; empty if it does.
    """

    def __init__(self, server: _ForkServer, limits: Limits, source: str, wall_s: float | None = None) -> None:
        self._server, self._limits, self._source = server, limits, source
        self._folder: str | None = None
        self._open(wall_s)

    def _open(self, wall_s: float | None) -> None:
        if not self._server.isolated:
            self._folder = tempfile.mkdtemp(prefix="sandbox")
        self._connection, child_end = socket.socketpair()
        with child_end:
            self._id = self._server.request({"do": "start", "folder": self._folder}, [child_end.fileno()])["id"]
        self._lost = False
        wall_s = self._send({"do": "load"}, self._source.encode("utf-8", "replace"), wall_s)
        answer = self._receive(time.monotonic() + wall_s)
        self.problem = str(answer[0].get("problem", "")) if answer else "the sandbox died while compiling the program"

    def run(self, stdin: str, wall_s: float | None = None) -> Outcome:
        """Run the program as a script.

        Args:
            stdin: standard input.
            wall_s: seconds by the clock, if lower than the limit.
        """
        return self._case({"do": "stdin"}, stdin.encode("utf-8", "replace"), wall_s)

    def call(self, function: str, arguments: Sequence[Any], wall_s: float | None = None) -> Outcome:
        """Call a function of the program, or a method of its class `Solution`.

        Args:
            function: name of the function.
            arguments: arguments that can be converted to JSON.
            wall_s: see `run`.

        Returns:
            An outcome whose `stdout` is the returned value as JSON.
        """
        packed = values.pack(list(arguments), _refuse_object)
        return self._case({"do": "call", "function": function}, json.dumps(packed).encode(), wall_s)

    def run_tests(
        self, test_program: Program, sources: Sequence[str], entry_point: str = "", wall_s: float | None = None
    ) -> Outcome:
        """Run unit tests on the program.

        Args:
            test_program: program of the same sandbox with empty source, in which the tests run.
            sources: source codes of tests: assertions, pytest functions, or a function `check(candidate)`.
            entry_point: name of the function that is passed to `check`; empty for other tests.
            wall_s: see `run`.

        Returns:
            Outcome of the test program, whose `stdout` is the result of `unit_tests.run_tests` as JSON.
        """
        program_end, tests_end = socket.socketpair()
        with program_end, tests_end:
            wall_s = self._send({"do": "serve"}, b"", wall_s, [program_end.fileno()])
            job = json.dumps({"sources": list(sources), "entry_point": entry_point})
            test_program._send({"do": "tests"}, job.encode(), wall_s, [tests_end.fileno()])
        return test_program._outcome(wall_s)

    def run_standalone_tests(self, sources: Sequence[str], wall_s: float | None = None) -> Outcome:
        """Run unit tests that need no program; see `run_tests`."""
        job = json.dumps({"sources": list(sources), "entry_point": ""})
        return self._case({"do": "tests"}, job.encode(), wall_s)

    def _case(self, header: dict[str, Any], body: bytes, wall_s: float | None) -> Outcome:
        return self._outcome(self._send(header, body, wall_s))

    def _send(
        self, header: dict[str, Any], body: bytes, wall_s: float | None, descriptors: Sequence[int] = ()
    ) -> float:
        """Send a message to the runner, and return the time limit that applies."""
        wall_s = min(wall_s or self._limits.wall_s, self._limits.wall_s)
        if self._lost:  # a late answer must not be read as the answer to the next message
            self.close()
            started = time.monotonic()
            self._open(wall_s)
            wall_s = max(_MIN_WALL_S, wall_s - (time.monotonic() - started))
        self._connection.settimeout(wall_s + _GRACE_S)
        with contextlib.suppress(OSError):  # `_receive` fails, too
            messages.send(self._connection, {**header, "wall_s": wall_s}, body, descriptors)
        return wall_s

    def _outcome(self, wall_s: float) -> Outcome:
        deadline = time.monotonic() + wall_s + _GRACE_S
        answer = self._receive(deadline)
        return _parse_outcome(*answer) if answer else Outcome("lost", -signal.SIGKILL, "", "")

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes] | None:
        max_body = (self._limits.output_kb + 2 * 1024) << 10
        try:
            return messages.receive(self._connection, max_body=max_body, deadline=deadline)[:2]
        except (EOFError, OSError, messages.InvalidMessageError):
            self._lost = True
            return None

    def close(self) -> None:
        """Kill the program and all processes that it started, and wait until they have ended."""
        self._connection.close()
        with contextlib.suppress(EOFError, OSError):  # if the fork server has ended, so has the program
            self._server.request({"do": "end", "id": self._id})
        if self._folder:
            folders.empty_folder(self._folder)
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_object(value: Any) -> Any:
    raise TypeError(f"the arguments of a call are data, not a {type(value).__name__}")


def _parse_outcome(header: dict[str, Any], body: bytes) -> Outcome:
    """Validate the message of a runner, which is untrusted."""
    status, code, length = (header.get(name) for name in ("status", "exit_code", "stdout"))
    if status not in ("finished", "timeout", "output") or not isinstance(code, int) or not isinstance(length, int):
        return Outcome("lost", -signal.SIGKILL, "", "")
    stdout, stderr = body[: max(0, length)], body[max(0, length) :]
    return Outcome(status, code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


def _environment() -> dict[str, str]:
    """Return the environment variables of the fork server; programs do not get `LD_LIBRARY_PATH`."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    libraries = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    return {
        **{"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"},
        **{"MALLOC_ARENA_MAX": "1", **threads, **libraries},
    }


def _library_folders() -> list[str]:
    """Return the folders of pytest and the libraries that it uses, which the fork server loads."""
    specs = {name: importlib.util.find_spec(name) for name in _TEST_LIBRARIES}
    if not specs["pytest"]:
        raise MissingDependencyError("sandbox: 'pytest' is not installed: pip install pytest", name="pytest")
    return sorted({os.path.dirname(os.path.dirname(spec.origin)) for spec in specs.values() if spec and spec.origin})


def _setup(limits: Limits, packages: Sequence[tuple[str, str]], isolated: bool) -> dict[str, Any]:
    stdlib = [os.path.dirname(os.path.realpath(os.__file__)), os.path.realpath(sysconfig.get_config_var("DESTSHARED"))]
    parents = [PACKAGES] if isolated else list(dict.fromkeys(os.path.dirname(path) for path, _ in packages))
    return {
        "limits": vars(limits),
        "isolated": isolated,
        "modules": _MODULES,
        "environment": {k: v for k, v in _environment().items() if k != "LD_LIBRARY_PATH"},
        "executable": os.path.realpath(sys.executable),
        "path": [*stdlib, *parents] if packages else stdlib,
        "packages": [name for _, name in packages if "." not in name],
        "visible_files": _visible_files(stdlib, packages),
    }


def _visible_files(stdlib: Sequence[str], packages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of `namespaces.VisibleFiles`: the interpreter, its modules and their shared libraries."""
    links = [(path, os.readlink(path)) for path in ("/lib", "/lib64", "/lib32") if os.path.islink(path)]
    multiarch = [f"{folder}/{sysconfig.get_config_var('MULTIARCH')}" for folder in ("/usr/lib", "/lib")]
    libraries = multiarch if os.path.isdir(multiarch[0]) else ["/usr/lib", "/lib"]
    prefix = () if sys.base_prefix == "/usr" else (os.path.join(sys.base_prefix, "lib"),)
    wanted = {
        *(*libraries, "/usr/lib64", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
        *(*prefix, *stdlib, os.path.realpath(sys.executable)),
    }
    present = sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})
    folders = [path for path in present if not any(path.startswith(other + "/") for other in present)]
    if in_tmp := [path for path in folders if path.startswith("/tmp/")]:
        raise SandboxError(f"sandbox: Python is in {in_tmp[0]}, but programs have a private /tmp; move it")
    patterns = [
        f"{folder}{subfolder}/{kind}-packages"
        for folder in folders
        for subfolder in ("", "/python3*")
        for kind in ("site", "dist")
    ]
    hidden = sorted(
        {os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)}
    )
    return {"folders": folders, "hidden": hidden, "links": links, "packages": list(packages)}


def _package_paths(packages: Sequence[str]) -> list[tuple[str, str]]:
    """Return (path, name) of each package, and of the folders with its shared libraries that wheels install."""
    paths = []
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise MissingDependencyError(f"sandbox: packages: '{name}' is not installed: pip install {name}", name=name)
        origin = os.path.realpath(spec.origin)
        path = os.path.dirname(origin) if spec.submodule_search_locations else origin
        paths.append((path, os.path.basename(path)))
        libraries = f"{path}.libs"
        if os.path.isdir(libraries):
            paths.append((libraries, os.path.basename(libraries)))
    return paths
