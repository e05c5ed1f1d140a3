"""Programs that try to get out, to look around, to harm their neighbours, or to take more than their share."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from itertools import cycle, islice
from pathlib import Path

import psutil
import pytest
from hostile_programs import ENDLESS, HOSTILE, descendants, listener, state, until

from roll_gspo.sandbox import Limits, Outcome, Sandbox

SECRET = "planted-secret-7c1f"
REASONS = {
    **dict.fromkeys(("memory bomb", "one huge block"), "MemoryError"),
    "shared memory": "Cannot allocate memory",
    **dict.fromkeys(("endless output", "endless complaints"), "printed too much"),
    "sleep": "took too long",
    "huge file": "File too large",
    **dict.fromkeys(("full tmp", "many files"), "No space left"),
    "many open files": "Too many open files",
    **dict.fromkeys(("daemon", "device"), "Operation not permitted"),
}
ROOT = Path(__file__).resolve().parents[2]


def attack(sandbox: Sandbox, name: str) -> Outcome:
    """Run a hostile program; afterwards the sandbox is empty."""
    with sandbox.start(HOSTILE[name]) as program:
        outcome = program.run("", wall_s=0.3 if name in ENDLESS else None)
        assert "escaped" not in outcome.stdout, outcome
        assert len(outcome.stdout) <= 64 * 1024
        assert name in ENDLESS or outcome.status != "lost"
    assert not descendants(sandbox._zygote._process.pid)
    return outcome


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_gets_nothing_and_leaves_nothing(sandbox, name):
    outcome = attack(sandbox, name)
    assert REASONS.get(name, "") in outcome.reason


@pytest.mark.parametrize("name", ["fork bomb", "daemon", "kill all", "kill the parent", "memory bomb", "clone"])
def test_hostile_program_that_may_start_processes_leaves_none(crowded, name):
    attack(crowded, name)


def run_of(sandbox: Sandbox, name: str, wall_s: float | None = None) -> Outcome:
    with sandbox.start(HOSTILE[name]) as program:
        return program.run("", wall_s)


def test_processor_time_is_limited_also_where_its_signal_is_ignored(sandbox):
    with Sandbox(Limits(wall_s=60, cpu_s=1)) as short:
        assert run_of(short, "deaf to signals").status == "timeout"


def test_number_of_processes_is_limited(crowded):
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
    with crowded.start(textwrap.dedent(source)) as program:
        assert 1 <= int(program.run("").stdout) <= 6 + 6 + 8


def test_environment_and_files_of_the_host_are_not_there(run, tmp_path, monkeypatch):
    (tmp_path / "sandbox_token").write_text(SECRET)
    home_file = Path.home() / ".sandbox_test_token"
    home_file.write_text(SECRET)
    places = [str(tmp_path / "sandbox_token"), str(home_file), str(ROOT), "/etc/passwd", "/var", "/sys", "/run"]
    source = f"""
        import os
        print([path for path in {places!r} if os.path.exists(path)], dict(os.environ))
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


def test_environment_of_this_process_does_not_reach_the_sandbox(sandbox):
    assert os.environ.get("SANDBOX_TEST_TOKEN") == SECRET
    assert SECRET.encode() not in Path(f"/proc/{sandbox._zygote._process.pid}/environ").read_bytes()


def test_network_is_out_of_reach(run, tmp_path):
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
            except OSError: print('alone')
        """
        outcome = run(textwrap.dedent(source))
        assert outcome.stdout == "alone\n", outcome
        with pytest.raises(BlockingIOError):
            server.accept()
        abstract.close()


def test_network_namespace_holds_without_the_filter(sandbox):
    """Two walls: what seccomp refuses, the namespace would not reach anyway."""
    zygote = sandbox._zygote._process.pid
    for kind in ("net", "mnt", "user", "ipc", "uts"):
        assert os.readlink(f"/proc/{zygote}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    interfaces = Path(f"/proc/{zygote}/net/dev").read_text().splitlines()[2:]
    assert all(line.strip().startswith("lo:") for line in interfaces)


def test_program_has_no_capability_and_no_way_to_one(run):
    outcome = run("print(open('/proc/self/status').read())")
    if not outcome.ok:
        pytest.skip("there is no /proc in this host's sandboxes")
    status = dict(line.split(":\t") for line in outcome.stdout.splitlines() if ":\t" in line)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == ["1000"] * 4


def test_other_processes_survive_attempts_to_kill_them(crowded, sandbox):
    victim = subprocess.Popen(["sleep", "600"])
    try:
        for box in (sandbox, crowded):
            with box.start(f"import os\nos.kill({victim.pid}, 9)") as program:
                assert "No such process" in program.run("").reason
            run_of(box, "kill all")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait(timeout=30)


def test_program_dies_with_the_process_that_runs_it(crowded):
    code = """
        import sys
        from roll_gspo.sandbox import Limits, Sandbox
        with Sandbox(Limits(wall_s=600, processes=4)) as box, box.start(sys.argv[1]) as program:
            program.run("")
    """
    hostile = "import os, time\nif not os.fork():\n    os.setsid()\nwhile True: time.sleep(0.1)"
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), hostile], cwd=ROOT)
    try:
        assert until(lambda: len(descendants(worker.pid)) >= 5)  # zygote, guard, runner, program and its child
        kin = [psutil.Process(pid) for pid in descendants(worker.pid)]
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(timeout=30)
        assert until(lambda: not any(process.is_running() for process in kin))
    finally:
        worker.kill()
        worker.wait(timeout=30)


def hostile_programs_in_a_row(number: int) -> None:
    """Several of each kind, in one sandbox; the host is as before when it is closed."""
    before = state()
    with Sandbox(Limits(wall_s=0.2, memory_mb=64, file_mb=4, tmp_mb=8, output_kb=64, processes=4)) as box:
        with box.start("") as program:
            program.run("")
        during = state()
        for name in islice(cycle(HOSTILE), number):
            with box.start(HOSTILE[name]) as program:
                assert "escaped" not in program.run("").stdout, name
        assert state() == during
        with box.start("print(input())") as program:
            assert program.run("still here", wall_s=60).status in ("finished", "timeout")
    assert state() == before


def test_hostile_programs_in_a_row_leave_nothing(sandbox):
    hostile_programs_in_a_row(len(HOSTILE))


def unprivileged(code: str, without_namespaces: bool) -> subprocess.CompletedProcess[str]:
    """Python code as `nobody`, by the interpreter of the system, which it can read."""
    if os.getuid() or not shutil.which("setpriv") or not os.access("/usr/bin/python3.11", os.X_OK):
        pytest.skip("needs root, setpriv and a Python 3.11 that another user can run")
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    limit = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh")
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
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
    """Whether `nobody` can read this checkout."""
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in (ROOT, *ROOT.parents)):
        pytest.skip("another user cannot read this checkout")


def test_sandbox_works_for_a_user_who_is_not_root(sandbox, readable):
    code = """
        from roll_gspo.sandbox import Limits, Sandbox
        with Sandbox(Limits(wall_s=60)) as box, box.start("import os\\nprint(os.getuid(), os.listdir())") as program:
            print(box.isolated, program.run("").stdout)
    """
    result = unprivileged(code, without_namespaces=False)
    assert result.stdout == "True 1000 []\n\n", result.stderr


def test_host_without_namespaces_is_refused_unless_unsafe(sandbox, readable):
    code = """
        from roll_gspo.sandbox import Limits, Sandbox, SandboxError
        try: Sandbox()
        except SandboxError as error: print(error)
        attacks = ("os.kill(-1, 9)", "os.kill(os.getppid(), 9)", "os.fork()", "__import__('socket').socket()")
        with Sandbox(Limits(wall_s=60), allow_unsafe=True) as box:
            for attack in ("print(os.listdir())", *attacks):
                with box.start("import os\\n" + attack) as program: print(program.run("").reason or "ok")
            with box.start("while True: pass") as program: print(program.run("", 0.2).reason)
    """
    result = unprivileged(code, without_namespaces=True)
    refused, *reasons = result.stdout.splitlines()
    assert "does not let us isolate programs ([Errno 28] unshare" in refused and "allow_unsafe: true" in refused
    forbidden = "exit code 1: PermissionError: [Errno 1] Operation not permitted"
    assert reasons == ["ok", *[forbidden] * 4, "took too long"]
    assert "can read the files of this user" in result.stderr


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_thousand_hostile_programs_in_a_row_leave_nothing(sandbox):
    hostile_programs_in_a_row(1000)
