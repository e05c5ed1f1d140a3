"""--multirun: names, parallel jobs, failures. Jobs are small Python programs; whole runs are in tests/e2e."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from roll_gspo.sweep import Sweep, job_command, parse_jobs, run_name, swept_keys


def program(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time\n{text}"]


def test_run_is_named_after_the_swept_values() -> None:
    assert run_name(["++seed=1", "importance_sampling=token"], 3) == "003_seed-1_importance_sampling-token"
    assert run_name(['++exp_name="a b\'/.."'], 0) == "000_exp_name-a-b-..-"
    assert len(run_name([f"++key={'x' * 500}"], 12)) <= 120


def test_job_command_names_the_run_and_drops_the_multirun_flag() -> None:
    swept = swept_keys(["algorithm=gspo,grpo", "seed=0,1", "max_steps=3"])
    assert swept == {"algorithm", "seed"}
    overrides = ["algorithm=gspo", "++seed=1", "++max_steps=3"]
    command, name = job_command(["--config-name", "example_gspo", "--multirun"], overrides, swept, 1)
    assert name == "001_algorithm-gspo_seed-1"
    assert command[1:] == ["-m", "roll_gspo.run", "--config-name", "example_gspo", *overrides, f"run_name='{name}'"]
    command, name = job_command([], [*overrides, "++run_name=mine"], swept, 1)
    assert name == "mine" and command[-1] == "++run_name=mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a=1", "--jobs", "3", "-m"], (3, ["a=1", "-m"])),
        (["--jobs=2"], (2, [])),
        (["a=1"], (1, ["a=1"])),
    ],
)
def test_parse_jobs_splits_off_the_flag(arguments: list[str], expected: tuple[int, list[str]]) -> None:
    assert parse_jobs(arguments) == expected


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs"], ["--jobs=two"]])
def test_parse_jobs_raises_without_a_positive_number(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--jobs: "):
        parse_jobs(arguments)


def test_limit_of_two_runs_two_jobs_at_a_time(tmp_path: Path) -> None:
    body = f"""
folder = {str(tmp_path)!r}
mine = os.path.join(folder, f"job{{os.getpid()}}")
open(mine, "w").close()
most = 0
for _ in range(15):
    most = max(most, len([n for n in os.listdir(folder) if n.startswith("job")]))
    time.sleep(0.1)
open(os.path.join(folder, f"seen{{os.getpid()}}"), "w").write(str(most))
os.remove(mine)
"""
    sweep = Sweep(limit=2)
    for number in range(3):
        sweep.start(program(body), f"job {number}")
    sweep.finish()
    seen = [int(file.read_text()) for file in tmp_path.glob("seen*")]
    assert len(seen) == 3 and max(seen) == 2


def test_jobs_share_the_threads(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("ROLL_GSPO_DRY_RUN", "1")  # shows what jobs print
    sweep = Sweep(limit=2)
    sweep.start(program("print('threads', os.environ['OMP_NUM_THREADS'])"), "job")
    sweep.finish()
    assert f"threads {max(1, (os.cpu_count() or 1) // 2)}" in capfd.readouterr().out


@pytest.mark.parametrize("limit", [1, 2])
def test_failed_job_ends_the_sweep_with_its_status_and_output(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, limit: int
) -> None:
    sweep = Sweep(limit)
    with pytest.raises(SystemExit) as stop:
        sweep.start(program("print('the reason', flush=True); sys.exit(3)"), "bad")
        sweep.start(program("time.sleep(1)"), "good")
        sweep.start(program(f"open({str(tmp_path / 'never')!r}, 'w')"), "never started")
    assert stop.value.code == 3 and not (tmp_path / "never").exists()
    out = capfd.readouterr().out
    assert "the reason" in out
    if limit == 2:
        assert "FAILED (exit status 3) bad after" in out and "finished good after" in out


def test_killed_job_counts_as_failed() -> None:
    sweep = Sweep(limit=1)
    with pytest.raises(SystemExit) as stop:
        sweep.start(program("os.kill(os.getpid(), 9)"), "killed")
    assert stop.value.code == 128 + 9
