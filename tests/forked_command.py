"""The command in a process that is forked from one with all engines imported.

A run in a new interpreter spends most of its time on the imports of torch, megatron-core and vLLM. Tests whose subject
is not the process use `train` instead of `commands.spawn`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from commands import ROOT, Outcome

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded_engines"])


def engines_imported() -> Any:
    """Return the context whose processes are forked from one with all engines imported; starts that one if needed."""
    inherited = os.environ.get("PYTHONPATH")
    # Python 3.11's fork server ignores the path of its parent, and skips modules that it does not find.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [inherited])])
    try:
        forkserver.ensure_running()
    finally:
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited
    return _CONTEXT


def train(*arguments: str, folder: Path, env: Mapping[str, str] | None = None, timeout_s: float = 180) -> Outcome:
    """Run `roll-gspo *arguments` in `folder`, in a forked process and a new process group.

    Args:
        arguments: of the command.
        folder: working directory of the run; modules in it can be imported.
        env: additional environment variables.
        timeout_s: limit after which the process is killed.

    Raises:
        TimeoutError: the command ran longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        started = time.perf_counter()
        process = engines_imported().Process(target=_run, args=(arguments, folder, dict(env or {}), out, err))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(
                f"roll-gspo {' '.join(arguments)}: still running after {timeout_s:g} s\n{err.read_text()}"
            )
        seconds = time.perf_counter() - started
        return Outcome(process.exitcode, out.read_text(), err.read_text(), seconds)


def _run(arguments: tuple[str, ...], folder: Path, env: dict[str, str], out: Path, err: Path) -> NoReturn:
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.update({"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env})
    sys.path.insert(0, str(folder))
    sys.argv = ["roll-gspo", *arguments]
    code = 1
    try:
        import roll_gspo.run

        roll_gspo.run.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
