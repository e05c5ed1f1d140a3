"""Fixtures that many tests share: a warm-started model and the command in this process."""

from __future__ import annotations

import os

# Set before torch is imported: spinning OpenMP threads take the cores from processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import REWARD, REWARD_MODULE, SIZES, Outcome
from composed import load_config
from ranks import Ranks

import roll_gspo.run

# A shell starts background jobs with SIGINT ignored, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`builtin:tiny_qwen3` after a short warm start: right format, mostly wrong answers."""
    from roll_gspo.pipelines.pretrain import prepare_checkpoint
    from roll_gspo.tracking.console import Console

    output = tmp_path_factory.mktemp("warm_start")
    config = load_config("example_gspo", "warm_start.steps=80", f"output_dir={output}").config
    with Console("warm start", 1, output) as console:
        return prepare_checkpoint(config, config.pretrain, console)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pool of processes that form gloo worlds."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder that holds only a user's reward module."""
    (tmp_path / "my_reward.py").write_text(REWARD_MODULE)
    return tmp_path


@pytest.fixture
def small(pretrained: Path) -> tuple[str, ...]:
    """Arguments of a training that takes seconds."""
    return (*SIZES, f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out")


@pytest.fixture
def command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run `roll-gspo ...` in this process, in a temporary folder."""
    import time

    monkeypatch.chdir(workplace)
    environment = dict(os.environ)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["roll-gspo", *arguments])
        capfd.readouterr()
        started, code = time.perf_counter(), 0
        try:
            roll_gspo.run.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        finally:
            os.environ.clear()
            os.environ.update(environment)
        out, err = capfd.readouterr()
        return Outcome(code, out, err, time.perf_counter() - started)

    return run
