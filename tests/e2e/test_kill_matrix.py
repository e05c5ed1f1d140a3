"""Kill each process in each stage: the resumed run gives the same numbers, or trains the same prompts once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import REWARD, REWARD_MODULE, ROOT, SIZES, computed, ids_by_step, metrics_of, rollouts_of

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(400)]

STAGES = ("generate", "score", "old_log_probs", "update", "sync_weights", "save")
VICTIMS = ("controller", "actor_train rank 1", "actor_infer rank 1", "reward")
ASYNC_STAGES = (("wait_rollouts", 1), ("update", 2), ("sync_weights", 2), ("validate", 2), ("save", 2))
ONE_STEP_OFF = ("async_generation_ratio=1", "max_steps=4")
IN_FLIGHT = ("async_generation_ratio=2", "async_mode=in_flight", "max_steps=4")
FSDP2 = ("strategy=fsdp2",)
LORA = (*FSDP2, "actor_train.model_args.lora.rank=4", "kl=loss")
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


def whole_run(folder: Path, *arguments: str) -> Path:
    """Return the folder of an undisturbed run."""
    code, output = run(folder, ["-m", "roll_gspo.run"], *arguments)
    assert code == 0, output
    return folder / RUN


@pytest.fixture(scope="module")
def whole(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole"), *arguments)


@pytest.fixture(scope="module")
def whole_ahead(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run whose generation is one step ahead."""
    return whole_run(tmp_path_factory.mktemp("ahead"), *arguments, *ONE_STEP_OFF)


@pytest.fixture(scope="module")
def whole_fsdp2(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run whose trainer is sharded over two ranks."""
    return whole_run(tmp_path_factory.mktemp("fsdp2"), *arguments, *FSDP2)


@pytest.fixture(scope="module")
def whole_lora(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that trains an adapter on two ranks and sends it to two engines."""
    return whole_run(tmp_path_factory.mktemp("lora"), *arguments, *LORA)


def killed_run(folder: Path, arguments: tuple[str, ...], stage: str, step: int, victim: str) -> str:
    """Train with a process killed, resume the run if that ended it, and return the output of the first process."""
    killing = [str(ROOT / "tests" / "killing_run.py"), stage, str(step), victim]
    code, output = run(folder, killing, *arguments)
    assert f"killing {victim} in {stage}" in output, output
    if code != 0:
        assert victim in ENDING, output
        assert victim == "controller" or ("died" in output and "resume_from_checkpoint=true" in output), output
        code, resumed = run(folder, ["-m", "roll_gspo.run"], *arguments, "resume_from_checkpoint=true")
        assert code == 0, resumed
    return output


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_process_does_not_change_the_result(
    tmp_path: Path, arguments: tuple[str, ...], whole: Path, victim: str, stage: str
) -> None:
    killed_run(tmp_path, arguments, stage, 2, victim)
    assert computed(tmp_path / RUN) == computed(whole)
    assert rollouts_of(tmp_path / RUN) == rollouts_of(whole)


@pytest.mark.parametrize(
    ("victim", "stage"), [("controller", "update"), ("actor_train rank 1", "update"), ("actor_train rank 1", "save")]
)
def test_killed_process_does_not_change_the_result_of_fsdp2(
    tmp_path: Path, arguments: tuple[str, ...], whole_fsdp2: Path, victim: str, stage: str
) -> None:
    killed_run(tmp_path, (*arguments, *FSDP2), stage, 2, victim)
    assert computed(tmp_path / RUN) == computed(whole_fsdp2)
    assert rollouts_of(tmp_path / RUN) == rollouts_of(whole_fsdp2)


@pytest.mark.parametrize(
    ("victim", "stage"),
    [("controller", "update"), ("actor_infer rank 1", "sync_weights"), ("actor_infer rank 1", "generate")],
)
def test_killed_process_does_not_change_the_result_of_an_adapter(
    tmp_path: Path, arguments: tuple[str, ...], whole_lora: Path, victim: str, stage: str
) -> None:
    killed_run(tmp_path, (*arguments, *LORA), stage, 2, victim)
    assert computed(tmp_path / RUN) == computed(whole_lora)
    assert rollouts_of(tmp_path / RUN) == rollouts_of(whole_lora)


def test_run_of_fsdp2_continues_with_another_number_of_ranks(
    tmp_path: Path, arguments: tuple[str, ...], whole_fsdp2: Path
) -> None:
    """Two ranks train the first step, one rank the second, and two the third."""
    one = ("actor_train.device_mapping=[0]", "actor_train.training_args.gradient_accumulation_steps=2")
    resumed = ("resume_from_checkpoint=true", "resume_with_changes=true")
    killing = str(ROOT / "tests" / "killing_run.py")
    for step, changes in ((2, ()), (3, (*one, *resumed))):
        _, output = run(tmp_path, [killing, "update", str(step), "controller"], *arguments, *FSDP2, *changes)
        assert "killing controller in update" in output, output
    code, output = run(tmp_path, ["-m", "roll_gspo.run"], *arguments, *FSDP2, *resumed)
    assert code == 0 and "resumed after step 2" in output, output
    for mine, other in zip(computed(tmp_path / RUN), computed(whole_fsdp2), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("stage", "step"), ASYNC_STAGES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_process_does_not_change_the_result_one_step_off(
    tmp_path: Path, arguments: tuple[str, ...], whole_ahead: Path, victim: str, stage: str, step: int
) -> None:
    killed_run(tmp_path, (*arguments, *ONE_STEP_OFF), stage, step, victim)
    assert computed(tmp_path / RUN) == computed(whole_ahead)
    assert rollouts_of(tmp_path / RUN) == rollouts_of(whole_ahead)


@pytest.mark.parametrize(("stage", "step"), ASYNC_STAGES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_process_loses_and_repeats_no_prompt_in_flight(
    tmp_path: Path, arguments: tuple[str, ...], whole_ahead: Path, victim: str, stage: str, step: int
) -> None:
    output = killed_run(tmp_path, (*arguments, *IN_FLIGHT), stage, step, victim)
    if victim.startswith("actor_infer") and stage == "wait_rollouts":
        assert "requests are continued" in output, output
    trained, expected = ids_by_step(tmp_path / RUN), ids_by_step(whole_ahead)
    assert {step: len(ids) for step, ids in trained.items()} == dict.fromkeys(range(1, 5), 8)
    assert sorted(id for ids in trained.values() for id in ids) == sorted(id for ids in expected.values() for id in ids)
    assert all(row["staleness/max"] <= 2 for row in metrics_of(tmp_path / RUN) if row["step"])
