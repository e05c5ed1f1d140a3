"""The command with `execution: ray`: the same numbers as in one process, also after workers died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import REWARD, REWARD_MODULE, ROOT, SIZES, Outcome, checkpoints_of, computed, rollouts_of
from forked_command import train

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RAY = ("execution=ray", "actor_infer.device_mapping=[0,1]")
RUNS = Path("out/example_gspo")


class Running:
    """The command in a new process, with all processes that it starts."""

    def __init__(self, workplace: Path, *arguments: str) -> None:
        self.run = workplace / RUNS / next(a.removeprefix("run_name=") for a in arguments if a.startswith("run_name="))
        self._log = workplace / f"{self.run.name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "roll_gspo.run", *arguments],
                cwd=workplace,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """Everything that the command printed."""
        return self._log.read_text()

    def after_step(self, step: int, within_s: float = 120) -> None:
        """Wait until the metrics of a step are written, i.e. the next step has begun."""
        metrics, until = self.run / "metrics.jsonl", time.monotonic() + within_s
        while not (metrics.exists() and metrics.read_text().count("\n") > step):  # one more for step 0
            assert self.process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.005)

    def family(self) -> list[psutil.Process]:
        """Return the process of the command and all its descendants."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def worker(self, name: str) -> psutil.Process:
        """Return the process of a worker, e.g. `actor_infer rank 1`."""
        (found,) = (p for p in self.family() if p.environ().get("ROLL_GSPO_WORKER") == name)
        return found

    def end(self, within_s: float = 120) -> int:
        """Wait for the command and return its exit status."""
        return self.process.wait(within_s)


def gone(processes: list[psutil.Process], within_s: float = 20) -> bool:
    """Return whether all processes end in time."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def whole(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two replicas."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    model = (f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out")
    running = Running(folder, *HF, *SIZES, *model, *RAY, "run_name=whole")
    assert running.end() == 0, running.log
    return running.run


def test_ray_gives_the_numbers_of_local_execution(command: Command, small: tuple[str, ...], whole: Path) -> None:
    before = set(psutil.Process().children(recursive=True))  # the fork server of other tests
    assert command(*HF, *small, "run_name=local").code == 0
    outcome = command(*HF, *small, "execution=ray", "run_name=ray")
    assert outcome.code == 0, outcome.err
    assert set(psutil.Process().children(recursive=True)) <= before
    assert computed(RUNS / "ray") == computed(RUNS / "local")
    assert rollouts_of(RUNS / "ray") == rollouts_of(RUNS / "local")
    assert checkpoints_of(RUNS / "ray") == checkpoints_of(RUNS / "local")
    # transformers rounds differently for another batch split, as with two replicas
    for one, two in zip(computed(RUNS / "local"), computed(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5), f"step {one['step']}"
    longer = command(*HF, *small, "run_name=ray", "resume_from_checkpoint=true", "max_steps=5")
    assert longer.code == 0 and "resumed after step 4" in longer.out, "a run can change its executor"


@pytest.mark.long
@pytest.mark.megatron
def test_roles_that_take_turns_give_the_same_numbers(command: Command, small: tuple[str, ...], whole: Path) -> None:
    outcome = command(*HF, *small, *RAY, "offload_states=true", "run_name=turns")
    assert outcome.code == 0, outcome.err
    assert computed(RUNS / "turns") == computed(whole) and rollouts_of(RUNS / "turns") == rollouts_of(whole)
    megatron = ("--config-name", "example_gspo", "layout=two_ranks", "actor_infer.strategy_args.strategy_name=hf_infer")
    distributed = "actor_train.strategy_args.strategy_config.use_distributed_optimizer=true"
    for value in ("true", "false"):
        run = command(
            *megatron, *small, distributed, "max_steps=2", f"offload_states={value}", f"run_name=turns_{value}"
        )
        assert run.code == 0, run.err
    assert computed(RUNS / "turns_true") == computed(RUNS / "turns_false")


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.megatron
def test_two_vllm_replicas_give_the_numbers_of_one(command: Command, workplace: Path, small: tuple[str, ...]) -> None:
    arguments = ("--config-name", "example_gspo", *small, "max_steps=3")
    local = train(*arguments, "run_name=local", folder=workplace)
    assert local.code == 0, local.err
    outcome = command(*arguments, *RAY, "run_name=ray")
    assert outcome.code == 0, outcome.err
    assert computed(RUNS / "ray") == computed(RUNS / "local")
    assert rollouts_of(RUNS / "ray") == rollouts_of(RUNS / "local")


@pytest.mark.long  # tests/roles/test_replicas.py loses replicas in every run
def test_lost_replica_is_restarted_and_its_prompts_are_repeated(
    workplace: Path, small: tuple[str, ...], whole: Path
) -> None:
    running = Running(workplace, *HF, *small, *RAY, "run_name=ray")
    running.after_step(1)
    family = running.family()
    running.worker("actor_infer rank 1").kill()
    assert running.end() == 0, running.log
    assert "actor_infer: starting rank 1 again" in running.log
    assert "actor_infer: rank 1" in running.log and "died during" in running.log
    assert computed(running.run) == computed(whole) and rollouts_of(running.run) == rollouts_of(whole)
    assert gone(family)


@pytest.mark.long
def test_lost_trainer_ends_the_run_and_names_the_fix(workplace: Path, small: tuple[str, ...], whole: Path) -> None:
    arguments = (*HF, *small, *RAY, "save_steps=1", "run_name=ray")
    running = Running(workplace, *arguments)
    running.after_step(2)
    family = running.family()
    running.worker("actor_train rank 0").kill()
    assert running.end() == 1
    assert "actor_train: rank 0 (process" in running.log and "Traceback" not in running.log
    assert "run_name=ray resume_from_checkpoint=true goes on from the last checkpoint" in running.log
    assert gone(family)
    again = Running(workplace, *arguments, "resume_from_checkpoint=true")
    assert again.end() == 0, again.log
    assert computed(again.run) == computed(whole) and rollouts_of(again.run) == rollouts_of(whole)


@pytest.mark.long
def test_lost_trainer_is_restarted_if_allowed(workplace: Path, small: tuple[str, ...], whole: Path) -> None:
    running = Running(workplace, *HF, *small, *RAY, "save_steps=1", "run_name=ray", "max_restarts=1")
    running.after_step(2)
    running.worker("actor_train rank 0").kill()
    assert running.end() == 0, running.log
    assert "restart 1 of 1, from the last checkpoint: actor_train: rank 0" in running.log
    assert "resumed after step" in running.log
    assert computed(running.run) == computed(whole) and rollouts_of(running.run) == rollouts_of(whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGKILL, signal.SIGINT))]
)
def test_no_process_outlives_the_command(
    workplace: Path, small: tuple[str, ...], whole: Path, number: signal.Signals
) -> None:
    running = Running(workplace, *HF, *small, *RAY, "save_steps=1", "run_name=ray")
    running.after_step(1)
    family = running.family()
    assert len(family) > 6, "the controller, Ray, a reward worker, a trainer, a reference, two replicas"
    listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    os.kill(running.process.pid, number)
    code = running.end()
    assert gone(family)
    if number != signal.SIGKILL:
        assert code == 128 + number, running.log
        assert f"{number.name}: finishing this step and saving" in running.log
        return
    again = Running(workplace, *HF, *small, *RAY, "run_name=ray", "resume_from_checkpoint=true")
    assert again.end() == 0, again.log
    assert computed(again.run) == computed(whole)
