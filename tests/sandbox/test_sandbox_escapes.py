"""Hostile programs: escapes, access to the host, attacks on other processes, and exhaustion of resources."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from itertools import cycle, islice
from pathlib import Path

import psutil
import pytest
from hostile_programs import ENDLESS, HOSTILE, descendants, host_state, listener, wait_until

from roll_gspo.sandbox import Limits, Outcome, Sandbox

SECRET = "planted-secret-7c1f"
REASONS = {
    **dict.fromkeys(("memory bomb", "one huge block"), "MemoryError"),
    "shared memory": "Cannot allocate memory",
    **dict.fromkeys(("endless output", "endless stderr"), "output limit exceeded"),
    "sleep": "timeout",
    "huge file": "File too large",
    **dict.fromkeys(("full tmp", "many files"), "No space left"),
    "many open files": "Too many open files",
    **dict.fromkeys(("daemon", "device"), "Operation not permitted"),
}
ROOT = Path(__file__).resolve().parents[2]


def attack(sandbox: Sandbox, name: str) -> Outcome:
    """Run a hostile program, and check that no process is left."""
    with sandbox.start(HOSTILE[name]) as program:
        outcome = program.run("", wall_s=0.3 if name in ENDLESS else None)
        assert "escaped" not in outcome.stdout, outcome
        assert len(outcome.stdout) <= 64 * 1024
        assert name in ENDLESS or outcome.status != "lost"
    assert not descendants(sandbox._server._process.pid)
    return outcome


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_does_not_escape_and_leaves_no_process(sandbox, name):
    outcome = attack(sandbox, name)
    assert REASONS.get(name, "") in outcome.reason


@pytest.mark.parametrize("name", ["fork bomb", "daemon", "kill all", "kill the parent", "memory bomb", "clone"])
def test_hostile_program_with_child_processes_leaves_none(multiprocess_sandbox, name):
    attack(multiprocess_sandbox, name)


def run_hostile(sandbox: Sandbox, name: str, wall_s: float | None = None) -> Outcome:
    with sandbox.start(HOSTILE[name]) as program:
        return program.run("", wall_s)


def test_cpu_time_is_limited_even_if_signals_are_ignored(sandbox):
    with Sandbox(Limits(wall_s=60, cpu_s=1)) as short:
        assert run_hostile(short, "ignore signals").status == "timeout"


def test_number_of_processes_is_limited(multiprocess_sandbox):
    source = """
        import os, sys, time
        started = 0
        try:
            while True:
                if not os.fork(): time.sleep(100)
                started += 1
        except BlockingIOError:
            print(started, flush=True)
    """
    with multiprocess_sandbox.start(textwrap.dedent(source)) as program:
        assert 1 <= int(program.run("").stdout) <= 6 + 6 + 8


def test_environment_and_files_of_the_host_are_not_visible(run, tmp_path, monkeypatch):
    (tmp_path / "sandbox_token").write_text(SECRET)
    home_file = Path.home() / ".sandbox_test_token"
    home_file.write_text(SECRET)
    paths = [str(tmp_path / "sandbox_token"), str(home_file), str(ROOT), "/etc/passwd", "/var", "/sys", "/run"]
    source = f"""
        import os
        print([path for path in {paths!r} if os.path.exists(path)], dict(os.environ))
        found = []
        for folder, _, files in os.walk('/'):
            found += {{'sandbox_token', '.sandbox_test_token', 'test_sandbox_escapes.py', 'docker.sock'}} & {{*files}}
        print(found, os.listdir('/home') if os.path.exists('/home') else [])
    """
    try:
        outcome = run(textwrap.dedent(source))
    finally:
        home_file.unlink()
    assert outcome.ok, outcome.stderr
    assert outcome.stdout.startswith("[] {'HOME': '/tmp'") and SECRET not in outcome.stdout
    assert outcome.stdout.splitlines()[1] == "[] []"


def test_fork_server_does_not_inherit_the_environment(sandbox):
    assert os.environ.get("SANDBOX_TEST_TOKEN") == SECRET
    assert SECRET.encode() not in Path(f"/proc/{sandbox._server._process.pid}/environ").read_bytes()


def test_network_is_not_reachable(run, tmp_path):
    with listener() as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0sandbox-test-{os.getpid()}")
        abstract.listen()
        source = f"""
            import socket, urllib.request
            for family, address in (
                (socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})), (socket.AF_INET6, ('::1', 80)),
                (socket.AF_UNIX, {str(tmp_path / "socket")!r}), (socket.AF_UNIX, '\\0sandbox-test-{os.getpid()}'),
            ):
                try: socket.socket(family).connect(address)
                except OSError: continue
                print('escaped', address)
            try: urllib.request.urlopen('http://127.0.0.1:{server.getsockname()[1]}', timeout=1)
            except OSError: print('unreachable')
        """
        outcome = run(textwrap.dedent(source))
        assert outcome.stdout == "unreachable\n", outcome
        with pytest.raises(BlockingIOError):
            server.accept()
        abstract.close()


def test_program_cannot_read_the_path_of_this_checkout(run):
    outcome = run("print(open('/proc/self/cmdline').read(), open('/proc/self/environ').read())")
    assert str(ROOT) not in outcome.stdout


def test_folders_of_any_mode_and_depth_are_removed_between_cases(sandbox):
    source = """
        import os
        print(os.listdir())
        os.makedirs('a/b')
        open('a/b/file', 'w').close()
        os.symlink('/usr', 'a/link')
        os.chmod('a/b', 0)
        os.chmod('a', 0)
        for _ in range(1500):
            os.mkdir('d' * 100)
            os.chdir('d' * 100)
        os.chmod('.', 0)
    """
    with sandbox.start(textwrap.dedent(source)) as program:
        outcomes = [program.run("") for _ in range(2)]
        assert [outcome.stdout for outcome in outcomes] == ["[]\n"] * 2, outcomes


def test_compiling_ends_at_the_time_limit(sandbox):
    nested = "".join(f"{' ' * i}try:\n{' ' * i} pass\n{' ' * i}finally:\n" for i in range(40)) + " " * 40 + "pass\n"
    started = time.monotonic()
    with sandbox.start(nested, wall_s=0.3) as program:
        # On a fast machine the limit of memory is met first, and the process survives.
        assert "compiling" in program.problem or "MemoryError" in program.problem
        assert program.run("", wall_s=0.3).status == ("lost" if "compiling" in program.problem else "finished")
    assert time.monotonic() - started < 30


def test_namespaces_isolate_without_the_seccomp_filter(sandbox):
    server = sandbox._server._process.pid
    for kind in ("net", "mnt", "user", "ipc", "uts"):
        assert os.readlink(f"/proc/{server}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    interfaces = Path(f"/proc/{server}/net/dev").read_text().splitlines()[2:]
    assert all(line.strip().startswith("lo:") for line in interfaces)


def test_program_has_no_capabilities_and_cannot_gain_any(run):
    outcome = run("print(open('/proc/self/status').read())")
    if not outcome.ok:
        pytest.skip("sandboxes of this host have no /proc")
    status = dict(line.split(":\t") for line in outcome.stdout.splitlines() if ":\t" in line)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == ["1000"] * 4


def test_program_cannot_kill_processes_of_the_host(multiprocess_sandbox, sandbox):
    victim = subprocess.Popen(["sleep", "600"])
    try:
        for box in (sandbox, multiprocess_sandbox):
            with box.start(f"import os\nos.kill({victim.pid}, 9)") as program:
                assert "No such process" in program.run("").reason
            run_hostile(box, "kill all")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait(timeout=30)


def test_program_ends_with_the_owner_of_the_sandbox(multiprocess_sandbox):
    code = """
        import sys
        from roll_gspo.sandbox import Limits, Sandbox
        with Sandbox(Limits(wall_s=600, processes=4)) as box, box.start(sys.argv[1]) as program:
            program.run("")
    """
    hostile = "import os, time\nif not os.fork():\n    os.setsid()\nwhile True: time.sleep(0.1)"
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), hostile], cwd=ROOT)
    try:
        # fork server, supervisor, runner, program and its child
        assert wait_until(lambda: len(descendants(worker.pid)) >= 5)
        processes = [psutil.Process(pid) for pid in descendants(worker.pid)]
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(timeout=30)
        assert wait_until(lambda: not any(process.is_running() for process in processes))
    finally:
        worker.kill()
        worker.wait(timeout=30)


def run_consecutively(number: int) -> None:
    """Run a number of hostile programs in one sandbox, and check that they leave the host unchanged."""
    before = host_state()
    with Sandbox(Limits(wall_s=0.2, memory_mb=64, file_mb=4, tmp_mb=8, output_kb=64, processes=4)) as box:
        with box.start("") as program:
            program.run("")
        during = host_state()
        for name in islice(cycle(HOSTILE), number):
            with box.start(HOSTILE[name]) as program:
                assert "escaped" not in program.run("").stdout, name
        assert host_state() == during
        with box.start("print(input())") as program:
            assert program.run("x", wall_s=60).status in ("finished", "timeout")
    assert host_state() == before


def test_consecutive_hostile_programs_leave_the_host_unchanged(sandbox):
    run_consecutively(len(HOSTILE))


def run_as_nobody(code: str, without_namespaces: bool) -> subprocess.CompletedProcess[str]:
    """Run Python code as user `nobody` with the system interpreter, which this user can read."""
    if os.getuid() or not shutil.which("setpriv") or not os.access("/usr/bin/python3.11", os.X_OK):
        pytest.skip("needs root, setpriv and a system Python 3.11")
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    limit = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh")
    paths = [str(ROOT), str(Path(pytest.__file__).parents[1])]
    path = f"import sys; sys.path.extend({paths!r}); sys.dont_write_bytecode = True\n"
    return subprocess.run(
        [*user, *(limit if without_namespaces else ()), "/usr/bin/python3.11", "-c", path + textwrap.dedent(code)],
        cwd="/",
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def readable() -> None:
    """Skip the test if `nobody` cannot read this checkout."""
    libraries = Path(pytest.__file__).parents[1]
    if not all(folder.stat().st_mode & 0o005 == 0o005 for p in (ROOT, libraries) for folder in (p, *p.parents)):
        pytest.skip("the user nobody cannot read this checkout or pytest")


def test_sandbox_works_without_root(sandbox, readable):
    code = """
        from roll_gspo.sandbox import Limits, Sandbox
        with Sandbox(Limits(wall_s=60)) as box, box.start("import os\\nprint(os.getuid(), os.listdir())") as program:
            print(box.isolated, program.run("").stdout)
    """
    result = run_as_nobody(code, without_namespaces=False)
    assert result.stdout == "True 1000 []\n\n", result.stderr


def test_host_without_namespaces_raises_unless_allow_unsafe(sandbox, readable):
    code = """
        from roll_gspo.sandbox import Limits, Sandbox, SandboxError
        try: Sandbox()
        except SandboxError as error: print(error)
        attacks = ("os.kill(-1, 9)", "os.kill(os.getppid(), 9)", "os.fork()", "__import__('socket').socket()",
                   "__import__('resource').prlimit(os.getppid(), 0, (1, 1))")
        with Sandbox(Limits(wall_s=60), allow_unsafe=True) as box:
            for attack in ("print(os.listdir())", *attacks):
                with box.start("import os\\n" + attack) as program: print(program.run("").reason or "ok")
            with box.start("while True: pass") as program: print(program.run("", 0.2).reason)
    """
    result = run_as_nobody(code, without_namespaces=True)
    error, *reasons = result.stdout.splitlines()
    assert "[Errno 28] unshare" in error and "allow_unsafe: true" in error
    denied = "exit code 1: PermissionError: [Errno 1] Operation not permitted"
    assert reasons == ["ok", *[denied] * 5, "timeout"]
    assert "allow_unsafe: " in result.stderr


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_1000_consecutive_hostile_programs_leave_the_host_unchanged(sandbox):
    run_consecutively(1000)
