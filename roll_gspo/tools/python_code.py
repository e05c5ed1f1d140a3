"""`python`: programs that the model writes, run in the sandbox."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from roll_gspo.sandbox import Limits, Outcome, Sandbox
from roll_gspo.tools.tool import ToolError

# Runs the program that it reads, and prints the value of a last expression as an interactive interpreter does. It
# parses the program inside the sandbox, because source code can exhaust the parser.
_RUNNER = """
import ast as _ast, linecache as _linecache, sys as _sys, traceback as _traceback

def _run(source, names):
    _linecache.cache["<code>"] = len(source), None, source.splitlines(True), "<code>"
    try:
        tree = _ast.parse(source, "<code>")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        _traceback.print_exception(error.with_traceback(None))
        raise SystemExit(1)
    try:
        is_expression = bool(tree.body) and isinstance(tree.body[-1], _ast.Expr)
        last = tree.body.pop() if is_expression else None
        exec(compile(tree, "<code>", "exec"), names)
        if last is not None:
            value = eval(compile(_ast.Expression(last.value), "<code>", "eval"), names)
            if value is not None:
                print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        _traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        raise SystemExit(1)

_run(_sys.stdin.read(), globals())
"""


class PythonCode:
    """Runs Python programs without network, files of the host, other processes or environment variables.

    Args:
        time_limit_s: seconds per program, by the clock and of CPU time.
        memory_mb: MiB per program.
        output_kb: KiB that a program may print.
        packages: installed packages that programs may import besides the standard library, e.g. [numpy].
        allow_unsafe: if True, programs run without isolation on a host that does not support it. Otherwise the tool
            cannot be built there.
    """

    def __init__(
        self,
        time_limit_s: float = 5.0,
        memory_mb: int = 512,
        output_kb: int = 64,
        packages: Sequence[str] = (),
        allow_unsafe: bool = False,
    ) -> None:
        limits = Limits(wall_s=time_limit_s, cpu_s=time_limit_s, memory_mb=memory_mb, output_kb=output_kb)
        self._sandbox = Sandbox(limits, packages, allow_unsafe)
        self._starting = threading.Lock()

    def __call__(self, code: str) -> str:
        """Run a Python program. The result is what it prints, and the value of its last line if that is an expression.

        Args:
            code: source code of the program. Nothing is kept from one call to the next.
        """
        with self._starting:
            program = self._sandbox.start(_RUNNER)
        with program:
            outcome = program.run(code)
        if outcome.ok:
            return outcome.stdout.rstrip("\n") or "(no output)"
        raise ToolError(_failure(outcome))


def _failure(outcome: Outcome) -> str:
    ended = "" if outcome.status == "finished" and outcome.stderr.strip() else outcome.reason
    return "\n".join(text for text in (ended, outcome.stdout.rstrip("\n"), outcome.stderr.strip()) if text)
