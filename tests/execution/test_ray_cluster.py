"""A cluster of `ray start`: two nodes on this machine with two devices each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from commands import metrics_of, spawn
from ray._private.authentication import authentication_token_setup
from ray_roles import Loner, Rank

from roll_gspo.errors import ConfigError
from roll_gspo.execution.base import Devices, ExecutionSettings
from roll_gspo.execution.ray.executor import RayExecutor

pytestmark = pytest.mark.long
RAY = Path(sys.executable).with_name("ray")


class TwoNodes:
    """Two raylets, started with `--block` so that each can be ended together with its processes."""

    def __init__(self, folder: str, *resources: str) -> None:
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._folder = Path(folder)
        head = self._start("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder}", *resources)
        self.address = _read(head, r"--address='([\d.:]+)'")
        _read(self._start(f"--address={self.address}", *resources), r"Ray runtime (started)")

    def _start(self, *arguments: str) -> Path:
        log = self._folder / f"node{len(self._nodes)}.log"
        with log.open("wb") as file:
            command = [str(RAY), "start", "--block", "--disable-usage-stats", *arguments]
            self._nodes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        return log

    def close(self) -> None:
        """End both nodes."""
        for node in reversed(self._nodes):
            node.terminate()
        for node in self._nodes:
            node.wait(30)


def _read(log: Path, pattern: str, within_s: float = 60) -> str:
    """Wait for `pattern` in the log and return its first group."""
    until = time.monotonic() + within_s
    while not (found := re.search(pattern, log.read_text())):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    return found[1]


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Use one authentication token for all clusters: a process can enable it only once."""
    subprocess.run([str(RAY), "get-auth-token", "--generate"], check=True, capture_output=True, timeout=60)
    before = os.environ.get("RAY_AUTH_MODE")
    authentication_token_setup._enable_token_auth()  # a later change of the environment has no effect
    yield
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    else:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    folder = tempfile.mkdtemp(prefix="ray")  # the path of pytest's folders is too long for sockets
    nodes = TwoNodes(folder, "--num-cpus=2", "--object-store-memory=100000000")
    yield nodes
    nodes.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def joined(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


def settings(*devices: int, per_node: int) -> ExecutionSettings:
    return ExecutionSettings(devices=devices, devices_per_node=per_node, call_timeout_s=60)


def test_workers_run_on_the_nodes_of_their_devices(joined: TwoNodes) -> None:
    executor = RayExecutor(settings(0, 1, 2, 3, per_node=2))
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        ranks = executor.start_group("actor_train", Rank, Devices((0, 2), 1, 2), one_world=True)
        nodes = [ranks.member(rank).identity.node_id for rank in (0, 1)]
        assert len(set(nodes)) == 2, "devices 0 and 2 of two a node"
        assert [ranks.call("surroundings", rank=rank)["LOCAL_RANK"] for rank in (0, 1)] == ["0", "0"]
        assert float(ranks.call("sum_over_ranks", torch.ones(()))) == 3, "a world over two nodes"
        engines = executor.start_group("actor_infer", Loner, Devices((0, 1, 2, 3), 2, 2), one_world=False)
        assert [engines.member(rank).identity.node_id for rank in (0, 1)] == nodes, "engines beside the trainer"
    finally:
        executor.close()
    assert not ray.is_initialized()


def test_missing_devices_of_a_cluster_are_named(joined: TwoNodes) -> None:
    with pytest.raises(
        ConfigError, match=r"takes 3 node\(s\) \(num_gpus_per_node 1\), but the Ray cluster has 2 .*start 1"
    ):
        RayExecutor(settings(0, 1, 2, per_node=1))
    with pytest.raises(ConfigError, match=r"takes 3 worker slot.s. .* on one node .* but the nodes .* with 2, "):
        RayExecutor(settings(0, 1, 2, per_node=8))
    assert not ray.is_initialized()


def test_unreachable_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="devices of 2 machines, but no Ray cluster is running here; run 'ray start"):
        RayExecutor(settings(0, 1, per_node=1))


@pytest.mark.e2e
def test_command_runs_on_both_nodes(joined: TwoNodes, workplace: Path, small: tuple[str, ...]) -> None:
    mapping = ("num_gpus_per_node=2", "actor_infer.device_mapping=[1,2]", "actor_train.device_mapping=[3]")
    arguments = ("--config-name", "example_gspo", "strategy=hf", *small, "max_steps=2", "execution=ray", *mapping)
    outcome = spawn(*arguments, "run_name=two", folder=workplace)
    assert outcome.code == 0, outcome.err
    assert f"joined the Ray cluster at {joined.address}" in outcome.out
    assert len(metrics_of(workplace / "out/example_gspo/two")) == 3


def test_gpus_of_a_bundle_are_assigned_to_its_workers() -> None:
    """Runs without GPUs: Ray counts declared resources, and workers see the assigned numbers."""
    folder = tempfile.mkdtemp(prefix="ray")
    nodes = TwoNodes(folder, "--num-gpus=2", "--num-cpus=2", "--object-store-memory=100000000")
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        executor = RayExecutor(settings(0, 1, 2, per_node=2))
        try:
            engines = executor.start_group("actor_infer", Loner, Devices((0, 1), 2, 2), one_world=False)
            ranks = executor.start_group("actor_train", Rank, Devices((1, 2), 1, 2), one_world=True)
            seen = [ranks.call("surroundings", rank=rank) for rank in (0, 1)]
            assert [s["CUDA_VISIBLE_DEVICES"] for s in seen] == ["1", "0"], "the second of node 0, the one of node 1"
            assert engines.call("environment", "CUDA_VISIBLE_DEVICES") == "0,1"
            assert [s["LOCAL_RANK"] for s in seen] == ["0", "0"], "a worker sees its own GPU only"
        finally:
            executor.close()
    finally:
        del os.environ["RAY_ADDRESS"]
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)
