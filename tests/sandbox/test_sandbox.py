"""Programs in the sandbox: input, output, exit codes and limits."""

from __future__ import annotations

import json
import signal

import pytest

from roll_gspo.sandbox import Limits, Sandbox


def test_program_reads_stdin_and_writes_stdout(run):
    outcome = run("n = int(input())\nprint(sum(map(int, input().split())) * n)\n", "2\n3 4\n")
    assert (outcome.status, outcome.exit_code, outcome.stdout, outcome.stderr) == ("finished", 0, "14\n", "")
    assert outcome.ok and not outcome.reason


def test_large_stdin_may_be_read_or_ignored(run):
    text = "x" * 300_000
    assert run("print('done')", text).stdout == "done\n"
    assert run("import sys; print(len(sys.stdin.read()))", text).stdout == "300000\n"


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        (
            "print(inf, gcd(4, 6), Counter('a'), List[int], pow(2, 5, 7))",
            "inf 2 Counter({'a': 1}) typing.List[int] 4\n",
        ),
        ("import sys\nprint(open('/dev/stdin').read(), sys.argv[0])", "text solution.py\n"),
        ("if __name__ == '__main__':\n    print('main')", "main\n"),
        ("import sys\nprint('bye')\nsys.exit()", "bye\n"),
        ("print('bye')\nexit()\nprint('no')", "bye\n"),
        ("quit(0)", ""),
        ("print(len(str(10**5000)))", "5001\n"),
        ("import atexit\natexit.register(print, 'last')", "last\n"),
        (
            "import threading, sys\nthreading.stack_size(1 << 26)\n"
            "def f(n): return 0 if n == 0 else f(n - 1) + 1\n"
            "t = threading.Thread(target=lambda: print(f(20000)))\nt.start()\nt.join()",
            "20000\n",
        ),
        ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()", "late\n"),
        ("import tempfile\nf = tempfile.NamedTemporaryFile()\nf.write(b'x')\nprint(f.name[:5])", "/tmp/\n"),
        ("import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))", "3\n"),
        ("import decimal, fractions, zoneinfo, ssl, sqlite3, ctypes, multiprocessing, unittest\nprint('all')", "all\n"),
    ],
)
def test_common_programs_run(run, source, printed):
    outcome = run(source, "text")
    assert outcome.stdout == printed, outcome.reason


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("1/0", 1, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)", 3, ""),
        ("exit(3)", 3, ""),
        ("import pytest", 1, "No module named 'pytest'"),
        ("import sys\nsys.exit('no such luck')", 1, "no such luck"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        ("import numpy", 1, "No module named 'numpy'"),
        ("import roll_gspo", 1, "No module named 'roll_gspo'"),
        ("def f(n): return f(n + 1)\nf(0)", 1, "RecursionError"),
        ("import os\nos.abort()", -6, "signal 6"),
        ("import ctypes\nctypes.string_at(1)", -11, "signal 11"),
    ],
)
def test_failure_has_exit_code_and_reason(run, source, code, text):
    outcome = run(source)
    assert outcome.exit_code == code and not outcome.ok
    assert text in outcome.reason


def test_program_that_does_not_compile_has_a_problem(sandbox):
    with sandbox.start("def f(:\n") as program:
        assert "SyntaxError" in program.problem


def test_cases_share_no_state(sandbox):
    source = "import os, builtins\nprint(sorted(os.listdir()), hasattr(builtins, 'seen'))\n"
    with sandbox.start(
        source + "builtins.seen = 1\nos.mkdir('d')\nopen('d/left', 'w').write('x')\nopen('f', 'w')"
    ) as program:
        assert [program.run("").stdout for _ in range(2)] == ["[] False\n"] * 2


def test_call_returns_the_value_and_discards_printed_output(sandbox):
    with sandbox.start(
        "print('loading')\nclass Solution:\n    def twice(self, x):\n        print(x)\n        return x * 2, {1}\n"
    ) as program:
        outcome = program.call("twice", [[1, 2]])
        assert json.loads(outcome.stdout) == [[1, 2, 1, 2], [1]]
        assert "absent" in program.call("absent", []).reason


def test_hash_order_is_the_same_in_every_run(run):
    assert len({run("print(*{str(i) for i in range(50)})").stdout for _ in range(3)}) == 1


def test_only_listed_packages_can_be_imported(sandbox):
    with Sandbox(sandbox.limits, packages=("numpy",)) as with_numpy:
        source = "import numpy\nprint(numpy.arange(3).sum())\ntry:\n    import torch\nexcept ImportError: print('none')"
        with with_numpy.start(source + "\ndef f(x): return numpy.sum(x), numpy.float32(x[0])") as program:
            outcome, returned = program.run(""), program.call("f", [[1, 2]])
    assert outcome.stdout == "3\nnone\n", outcome.stderr
    assert returned.stdout == "[3, 1.0]", returned.stderr


def test_two_programs_run_concurrently(sandbox):
    with sandbox.start("print(input())") as one, sandbox.start("print(input() * 2)") as two:
        assert (one.run("a").stdout, two.run("b").stdout, one.run("c").stdout) == ("a\n", "bb\n", "c\n")


@pytest.mark.parametrize(
    "limits", [{"wall_s": 0}, {"processes": 0}, {"memory_mb": 1.5}, {"open_files": True}, {"cpu_s": "2"}]
)
def test_invalid_limit_raises(limits):
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=f"^{name} is {value!r}"):
        Limits(**limits)


def test_late_answer_is_not_read_as_the_answer_for_another_program(sandbox):
    with Sandbox(sandbox.limits) as slow:
        with slow.start("print(1)"):
            slow._server._control.settimeout(1)
            slow._server._process.send_signal(signal.SIGSTOP)
        slow._server._process.send_signal(signal.SIGCONT)
        with slow.start("print(2)") as program:
            assert program.run("").stdout == "2\n"


def test_killed_fork_server_is_replaced(sandbox):
    with Sandbox(sandbox.limits) as short_lived:
        short_lived._server._process.kill()
        short_lived._server._process.wait(timeout=30)
        with short_lived.start("print(1)") as program:
            assert program.run("").stdout == "1\n"
