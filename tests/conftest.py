"""A model that several tests train, and the command in this process."""

from __future__ import annotations

import os

# Before torch is imported: threads that spin while they wait take the cores from the processes that tests start.
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

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be every run that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`builtin:tiny_qwen3` after a short warm start: it answers in columns, and mostly wrong."""
    from roll_gspo.pipelines.pretrain import prepare_checkpoint
    from roll_gspo.tracking.console import Console

    output = tmp_path_factory.mktemp("warm_start")
    config = load_config("example_gspo", "warm_start.steps=80", f"output_dir={output}").config
    with Console("warm start", 1, output) as console:
        return prepare_checkpoint(config, config.pretrain, console)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that form process groups."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """An empty folder, but for a user's own rewards."""
    (tmp_path / "my_reward.py").write_text(REWARD_MODULE)
    return tmp_path


@pytest.fixture
def small(pretrained: Path) -> tuple[str, ...]:
    """Arguments of a training of seconds."""
    return (*SIZES, f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out")


@pytest.fixture
def command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`roll-gspo ...` in this process, in a folder of its own."""
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
