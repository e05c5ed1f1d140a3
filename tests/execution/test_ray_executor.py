"""Worker groups of real Ray actors: calls, errors, deaths, timeouts and clean-up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray_roles import Loner, Rank, refuse

from roll_gspo.errors import ConfigError, TrainingError, WorkerDiedError, WorkerError, WorkerHungError
from roll_gspo.execution.base import Devices, ExecutionSettings, gather
from roll_gspo.execution.ray import executor as executor_module
from roll_gspo.execution.ray.executor import RayExecutor
from roll_gspo.execution.ray.group import RayGroup

SETTINGS = ExecutionSettings(
    devices=(0, 1), devices_per_node=2, call_timeout_s=60, heartbeat_timeout_s=60, environment={"MARK": "here"}
)
TWO = Devices((0, 1), per_worker=1, per_node=2)


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    made = RayExecutor(SETTINGS)
    yield made
    made.close()


def group_of(executor: RayExecutor, make=Rank, *, one_world: bool = True, **limits: float) -> RayGroup:
    """Build a group of two ranks with the given limits."""
    return RayGroup("actor_train", make, TWO, one_world, executor._cluster, replace(executor._settings, **limits))


@pytest.fixture(scope="module")
def world(executor: RayExecutor) -> Iterator[RayGroup]:
    """Two ranks, shared by the tests that do not kill them."""
    group = group_of(executor)
    yield group
    group.close()


def gone(pids: list[int], within_s: float = 10) -> bool:
    """Return whether every process ends in time."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_ranks_form_a_world_and_receive_the_whole_batch(world: RayGroup) -> None:
    batch = torch.arange(6.0).reshape(2, 3)
    seen: list[tuple[int, int]] = []
    result = world.call("sum_over_ranks", batch, lambda done, total: seen.append((done, total)))
    assert torch.equal(result, batch * 3)
    assert seen and seen == sorted(seen) and seen[-1][1] == 5 and len(set(seen)) > 1
    assert world.size == 2 and world.alive(0) and world.alive(1)


def test_worker_has_its_environment_its_folder_and_one_thread(world: RayGroup) -> None:
    first, second = (world.call("surroundings", rank=rank) for rank in (0, 1))
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == world.host(0)
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != ""
    assert first["MARK"] == "here" and first["CUDA_VISIBLE_DEVICES"] == "" and first["OMP_NUM_THREADS"] == "1"
    assert first["cwd"] == os.getcwd()
    assert world.call("in_building_thread")
    assert world.pid(0) != world.pid(1) == world.call("pid", rank=1)


def listening(pids: set[int]) -> dict[str, set[str]]:
    """Return the addresses on which processes listen, by the command of the process."""
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]:
        ends = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        found.setdefault(" ".join(process.cmdline())[:100], set()).update(ends)
    return found


def test_local_cluster_and_its_worlds_listen_on_loopback_only(world: RayGroup) -> None:
    started = {process.pid for process in psutil.Process().children(recursive=True)}
    found = listening({os.getpid(), *started, world.pid(0), world.pid(1)})
    assert any("gcs_server" in name and ips for name, ips in found.items())
    assert {ip for ips in found.values() for ip in ips} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found
    assert (Path.home() / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_calls_run_concurrently_across_ranks_and_in_order_within_one(world: RayGroup) -> None:
    one = torch.ones(1)
    results = gather([world.submit("sum_over_ranks", one * n) for n in range(3)])
    assert [float(result) for result in results] == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("only", [0, 1])
def test_error_of_this_package_keeps_its_type(world: RayGroup, only: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingError, match=rf"were not finite \(actor_train rank {only}\)"):
        world.call("fail", "own", only)
    assert [r.message for r in caplog.records if r.name == "roll_gspo.roles"] == ["about to fail"]
    assert world.alive(0) and world.alive(1)


def test_other_errors_come_with_their_traceback(world: RayGroup) -> None:
    with pytest.raises(
        WorkerError, match=r"rank 1 .process .* failed in 'fail': ZeroDivisionError: unexpected"
    ) as info:
        world.call("fail", "other", 1)
    assert 'raise ZeroDivisionError("unexpected")' in str(info.value)
    with pytest.raises(OSError, match="No space left on device") as full:
        world.call("fail", "disk", 0)
    assert full.value.errno == 28


def test_role_that_cannot_be_built_raises_its_own_error(executor: RayExecutor) -> None:
    with pytest.raises(ConfigError, match=r"0 is not positive; set 1 or more \(actor_train rank \d\)"):
        group_of(executor, refuse)


def test_dead_rank_ends_its_group_at_once(executor: RayExecutor) -> None:
    group = group_of(executor)
    pids = [group.pid(0), group.pid(1)]
    started = time.monotonic()
    with pytest.raises(WorkerDiedError, match=rf"actor_train: rank 1 \(process {pids[1]} on .*\) died during 'die'"):
        group.call("die", 1)
    assert time.monotonic() - started < 20
    assert gone(pids)
    with pytest.raises(WorkerDiedError, match=r"'pid'.*died during 'die'"):
        group.call("pid")


def test_call_that_exceeds_its_timeout_is_killed(executor: RayExecutor) -> None:
    group = group_of(executor, call_timeout_s=8)  # the start counts as a call
    pids = [group.pid(0), group.pid(1)]
    with pytest.raises(WorkerHungError, match=r"rank 1 \(process \d+ .* 'hang' .worker_timeout_s 8"):
        group.call("hang", 1)
    assert gone(pids)


def test_process_without_heartbeat_is_killed(executor: RayExecutor) -> None:
    group = group_of(executor, heartbeat_timeout_s=5)
    pids = [group.pid(0), group.pid(1)]
    with pytest.raises(WorkerHungError, match=r"rank 0 .* killed after \d+ s .*'die' .heartbeat_timeout_s 5"):
        group.call("die", 0, signal.SIGSTOP)
    assert gone(pids)


def test_replicas_are_independent_and_can_be_restarted(executor: RayExecutor, tmp_path: Path) -> None:
    group = group_of(executor, partial(Loner, str(tmp_path / "mark"), 2), one_world=False)
    assert group.call("world") == (False, "")
    (_, first), (_, second) = (group.call("double", [1], rank=rank) for rank in (0, 1))
    with pytest.raises(WorkerDiedError, match="rank 1"):
        group.call("double", [2], rank=1)
    assert group.alive(0) and not group.alive(1)
    assert group.call("double", [3], rank=0) == ([6], first)
    group.restart(1)
    numbers, third = group.call("double", [4], rank=1)
    assert numbers == [8] and third not in (first, second)
    group.close()
    assert gone([first, second, third])


def test_executor_closes_local_roles_and_groups(executor: RayExecutor, tmp_path: Path) -> None:
    role = executor.start("reference", partial(Rank, str(tmp_path / "closed")), Devices((1,), 1, 2))
    here = executor.start("rewards", lambda: Rank(str(tmp_path / "here")))
    assert isinstance(here, Rank)
    pid = role.pid()
    assert pid != os.getpid()
    while executor._roles:
        executor._roles.pop()[1].close()
    assert (tmp_path / "closed").read_text() == (tmp_path / "here").read_text() == "closed"
    assert gone([pid])


def test_variables_of_a_role_give_way_to_those_of_the_run(executor: RayExecutor) -> None:
    own = {"MARK": "of the role", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    group = executor.start_group("actor_infer", Loner, Devices((1,), 1, 2), one_world=False, environment=own)
    assert [group.call("environment", name) for name in own] == ["here", "1"]
    executor._roles.pop()[1].close()


def test_variables_of_gpu_libraries_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "FLASHINFER_WORKSPACE_BASE", "NCCL_DEBUG"),
        *("NVTE_FUSED_ATTN", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TRITON_CACHE_DIR", "VLLM_BATCH_INVARIANT"),
    }
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONSTARTUP", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    forwarded = executor_module._forwarded()
    assert names <= forwarded.keys() and not {"PYTHONSTARTUP", "CUDA_VISIBLE_DEVICES"} & forwarded.keys()


def test_second_connection_and_missing_nodes_are_rejected(executor: RayExecutor) -> None:
    with pytest.raises(ConfigError, match=r"ray\.shutdown"):
        RayExecutor(SETTINGS)
    assert ray.is_initialized()
