"""Kill each process in each stage: the resumed run gives the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import REWARD, REWARD_MODULE, ROOT, SIZES, computed, rollouts_of

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(400)]

STAGES = ("generate", "score", "old_log_probs", "update", "sync_weights", "save")
VICTIMS = ("controller", "actor_train rank 1", "actor_infer rank 1", "reward")
ENDING = ("controller", "actor_train rank 1")  # a run ends if it loses one of these
RUN = Path("out/example_gspo/run")


@pytest.fixture(scope="module")
def arguments(pretrained: Path) -> tuple[str, ...]:
    return (
        *("--config-name", "example_gspo", "layout=two_ranks", *SIZES, "save_steps=1", "max_steps=3"),
        *(f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out", "run_name=run"),
    )


def run(folder: Path, program: list[str], *arguments: str) -> tuple[int, str]:
    """Run the program and return (exit status, output); check that no process is left."""
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=300)
    assert not list(left_over(folder)), output
    return process.returncode, output


def left_over(folder: Path) -> Iterator[psutil.Process]:
    """Yield processes that still run in the folder after a grace period."""
    mine = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                mine.append(process)
        except (psutil.Error, OSError):
            continue
    _, alive = psutil.wait_procs(mine, timeout=20)
    yield from alive


@pytest.fixture(scope="module")
def whole(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, output = run(folder, ["-m", "roll_gspo.run"], *arguments)
    assert code == 0, output
    return folder / RUN


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_process_does_not_change_the_result(
    tmp_path: Path, arguments: tuple[str, ...], whole: Path, victim: str, stage: str
) -> None:
    killing = [str(ROOT / "tests" / "killing_run.py"), stage, "2", victim]
    code, output = run(tmp_path, killing, *arguments)
    if code != 0:
        assert victim in ENDING, output
        assert victim == "controller" or ("died" in output and "resume_from_checkpoint=true" in output), output
        code, output = run(tmp_path, ["-m", "roll_gspo.run"], *arguments, "resume_from_checkpoint=true")
        assert code == 0, output
    assert computed(tmp_path / RUN) == computed(whole)
    assert rollouts_of(tmp_path / RUN) == rollouts_of(whole)
