"""Processes of agents: environment, limits, and that none is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from roll_gspo.roles.agents.program import AgentCommand, AgentProgram


def run(*arguments: str, **options: object) -> tuple[int, AgentProgram]:
    """Run a program to its end."""
    program = AgentProgram(AgentCommand(arguments, **options), "http://x/v1", "secret", {"id": 1}, 5)  # type: ignore[arg-type]
    wait_until(lambda: program.poll() is not None)
    code = program.poll()
    program.kill()
    assert code is not None
    return code, program


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_environment_has_no_secrets_of_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("SEARCH_KEY", "shown")
    _, program = run("sh", "-c", "env >&2", env={"MODE": "train"}, forward_env=("SEARCH_KEY",))
    seen = dict(line.split("=", 1) for line in program.last_errors().splitlines())
    expected = {
        **{"OPENAI_BASE_URL": "http://x/v1", "OPENAI_API_KEY": "secret", "ROLL_GSPO_SEED": "5"},
        **{"MODE": "train", "SEARCH_KEY": "shown", "NO_PROXY": "127.0.0.1,localhost"},
    }
    assert expected.items() <= seen.items()
    assert "WANDB_API_KEY" not in seen
    assert not Path(seen["TMPDIR"]).exists()


@pytest.mark.parametrize(
    ("printed", "reward"),
    [
        ('{"reward": 0.5}', 0.5),
        ('no\n{"reward": 2}\n\n', 2.0),
        ('{"reward": 1}\nbye', None),
        ('{"reward": NaN}', None),
        ('{"score": 1}', None),
        ("[1]", None),
        ("", None),
    ],
)
def test_reward_is_the_last_line(printed: str, reward: float | None):
    code, program = run("printf", "%s", printed)
    assert (code, program.printed_reward()) == (0, reward)


def test_exit_codes_and_last_lines():
    code, program = run("sh", "-c", "seq 1 30000 >&2; seq 1 100000; exit 3")
    assert code == 3
    assert program.last_errors().splitlines() == [str(number) for number in range(29981, 30001)]
    assert run("no_such_program")[0] == 127
    assert run("sh", "-c", "kill -9 $$")[0] == 128 + 9


def test_memory_limit():
    code, program = run("python", "-c", "bytearray(400 << 20)", max_memory_mb=200)
    assert (code, program.last_errors().splitlines()[-1]) == (1, "MemoryError")


def test_processes_that_a_program_leaves_are_killed(tmp_path: Path):
    daemon = f"setsid sh -c 'echo $$ > {tmp_path}/pid; sleep 60' & while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done"
    assert run("sh", "-c", daemon)[0] == 0
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_programs_end_with_the_controller(tmp_path: Path):
    code = (
        "import os, signal, time\n"
        "from roll_gspo.roles.agents.program import AgentCommand, AgentProgram\n"
        f"command = AgentCommand(('sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 60'))\n"
        "program = AgentProgram(command, 'u', 'k', {}, 0)\n"
        f"while not os.path.exists('{tmp_path}/pid') or not open('{tmp_path}/pid').read(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=60, check=False)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_program_starts_if_no_path_leads_to_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != root])
    code, program = run("sh", "-c", "echo '{\"reward\": 1}'")
    assert (code, program.printed_reward()) == (0, 1.0), program.last_errors()
