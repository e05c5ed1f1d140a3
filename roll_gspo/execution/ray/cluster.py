"""The Ray cluster of a run: join or start it, check it against the device mappings, and reserve devices."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roll_gspo.errors import ConfigError
from roll_gspo.execution.base import Devices, ExecutionSettings

logger = logging.getLogger(__name__)
_RESERVE_TIMEOUT_S = 60.0
_OBJECT_STORE_BYTES = 512 << 20  # of a local Ray without GPUs; larger data spills to disk
_RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the controller assigns devices, not Ray
    "RAY_prestart_worker_first_driver": "0",  # prestarted workers would be unused: each has a different environment
}


@dataclass(frozen=True)
class Node:
    """A node of the placement group.

    Attributes:
        host: IP address.
        slots: device numbers that roles use on this node, ascending.
        gpu_ids: IDs of the reserved GPUs in the same order; None if devices are worker slots.
    """

    host: str
    slots: tuple[int, ...]
    gpu_ids: tuple[str, ...] | None


class Cluster:
    """A connection to Ray with the reserved devices of one run.

    Raises:
        ConfigError: the cluster has fewer nodes or devices than the device mappings need.
    """

    def __init__(self, settings: ExecutionSettings) -> None:
        by_node: dict[int, list[int]] = {}
        for device in sorted(set(settings.devices)):
            by_node.setdefault(device // settings.devices_per_node, []).append(device)
        self._is_local = _connect(by_node)
        self._reaper = _AgentReaper() if self._is_local else None
        self._group: PlacementGroup | None = None
        try:
            kind, amounts = _check(by_node, settings.devices_per_node)
            self._group = _reserve([{kind: float(amount)} for amount in amounts])
            self.uses_gpus = kind == "GPU"
            self._nodes = dict(zip(by_node, _nodes(self._group, list(by_node.values()), self.uses_gpus), strict=True))
            self._bundles = {node: index for index, node in enumerate(by_node)}
        except BaseException:
            self.close()
            raise
        self.own_node_id = ray.get_runtime_context().get_node_id()

    def strategy(self, devices: Devices, rank: int) -> PlacementGroupSchedulingStrategy:
        """Return the scheduling strategy that places a worker on the node of its devices."""
        assert self._group is not None
        return PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._bundles[devices.node_of(rank)]
        )

    def environment(self, devices: Devices, rank: int) -> dict[str, str]:
        """Return the variables that make only its own devices visible to a worker."""
        node = self._nodes[devices.node_of(rank)]
        if node.gpu_ids is None:
            return {"CUDA_VISIBLE_DEVICES": ""}
        ids = (node.gpu_ids[node.slots.index(device)] for device in devices.of_worker(rank))
        return {"CUDA_VISIBLE_DEVICES": ",".join(ids), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}

    def close(self) -> None:
        """Release the devices and disconnect; a local Ray is shut down."""
        if not ray.is_initialized():
            return
        if self._group is not None and not self._is_local:
            remove_placement_group(self._group)
        self._group = None
        ray.shutdown()
        if self._reaper is not None:
            self._reaper.close()


class _AgentReaper:
    """Kills the agents that a raylet started, if this process is killed: they would outlive it for a while.

    A shell waits for the end of a pipe that this process holds open, then kills them.
    """

    def __init__(self) -> None:
        started = psutil.Process().children(recursive=True)
        agents = [str(p.pid) for p in started if p.name().startswith("ray::") or "agent" in " ".join(p.cmdline())]
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", "read -r word; sleep 1; kill -9 " + " ".join(agents)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # not interrupted by Ctrl-C
        )

    def close(self) -> None:
        """End the shell without killing anything."""
        self._shell.kill()
        self._shell.communicate()


def _connect(by_node: Mapping[int, Sequence[int]]) -> bool:
    """Join the cluster of RAY_ADDRESS or of `ray start` on this machine, else start one; return True if started."""
    for name, value in _RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray_worker.print_to_stdstream = _log_ray_output  # Ray has no setting to silence it
    if ray.is_initialized():
        raise ConfigError("execution: ray: this process is already connected to Ray; call ray.shutdown() first")
    address = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
    if address and address != "local" and (os.environ.get("RAY_ADDRESS") or _is_reachable(address)):
        if not os.environ.get("RAY_ADDRESS"):  # as ray.init does for a cluster that it finds
            authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            with _sigterm_handler_restored():
                ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"execution: ray: the cluster at {address} cannot be joined ({error}); check RAY_ADDRESS and "
                "RAY_AUTH_MODE (token or disabled), which must equal that of the cluster; "
                "RAY_ADDRESS=local starts a local Ray instead"
            ) from error
        logger.info("joined the Ray cluster at %s", address)
        return False
    if len(by_node) > 1:
        raise ConfigError(
            f"device_mapping: takes devices of {len(by_node)} machines, but no Ray cluster is running here; run "
            "'ray start --head' on this machine and 'ray start --address=IP:6379' on the others, or set "
            "num_gpus_per_node to what this machine has"
        )
    slots = max(len(devices) for devices in by_node.values())
    _protect_token()
    with _sigterm_handler_restored(), _loopback_only():
        ray.init(
            address="local",
            num_cpus=slots,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES if not _has_gpu() else None,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    logger.info("started Ray on this machine with %d worker slots", slots)
    return True


def _protect_token() -> None:
    """Create Ray's token so that only this user can read it; Ray would create it readable for everybody."""
    if os.environ.get(authentication_token_setup.AUTH_MODE_ENV_VAR, "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:  # e.g. no home folder; Ray reports it if it needs the token
        logger.warning("%s: cannot be made readable for this user only (%s); change its mode to 0600", path, error)


def _log_ray_output(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    """Log output of raylets at debug level; the death of a worker raises in the controller anyway."""
    logger.debug("ray: %s", " ".join(data["lines"]))


def _is_reachable(address: str) -> bool:
    """Return whether a Ray head listens at `address`: a killed `ray start` leaves its address file behind."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _sigterm_handler_restored() -> Iterator[None]:
    """Restore the SIGTERM handler, which `ray.init` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Start Ray at 127.0.0.1: for any other address its servers listen on all interfaces.

    Ray replaces a loopback `_node_ip_address` by the address of an interface unless clusters are disabled, as on macOS.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check(by_node: Mapping[int, Sequence[int]], per_node: int) -> tuple[str, list[int]]:
    """Return the resource kind of devices (GPU or CPU) and the number of devices per node of the run.

    Raises:
        ConfigError: the cluster has too few nodes or devices.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if any(node["Resources"].get("GPU") for node in nodes) else "CPU"
    amounts = [len(devices) for devices in by_node.values()]
    have = sorted((int(node["Resources"].get(kind, 0)) for node in nodes), reverse=True)
    found = ", ".join(f"{n['NodeManagerAddress']} with {int(n['Resources'].get(kind, 0))}" for n in nodes)
    what = "GPU(s)" if kind == "GPU" else "worker slot(s) (CPUs)"
    for index, amount in enumerate(sorted(amounts, reverse=True)):
        if index >= len(have):
            raise ConfigError(
                f"device_mapping: takes {len(amounts)} node(s) (num_gpus_per_node {per_node}), but the Ray cluster has "
                f"{len(have)} ({found}); start {len(amounts) - len(have)} more with 'ray start --address=...', or "
                "change device_mapping or num_gpus_per_node"
            )
        if have[index] < amount:
            raise ConfigError(
                f"device_mapping: takes {amount} {what} on one node (num_gpus_per_node {per_node}), but the nodes of "
                f"the Ray cluster are {found}; change device_mapping or num_gpus_per_node, or start Ray with more"
            )
    return kind, amounts


def _reserve(bundles: list[dict[str, float]]) -> PlacementGroup:
    """Reserve one bundle per node, each on a different node.

    Raises:
        ConfigError: other jobs hold the resources.
    """
    group = placement_group(bundles, strategy="STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK")
    if not group.wait(_RESERVE_TIMEOUT_S):
        available = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        remove_placement_group(group)
        raise ConfigError(
            f"execution: ray: {bundles} could not be reserved within {_RESERVE_TIMEOUT_S:g} s; the cluster has "
            f"{available} free and other jobs hold the rest; wait for them, or use fewer devices"
        )
    return group


def _nodes(group: PlacementGroup, slots: list[list[int]], uses_gpus: bool) -> list[Node]:
    table = placement_group_table(group)["bundles_to_node_id"]
    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    gpu_ids: list[tuple[str, ...] | None] = [None] * len(slots)
    if uses_gpus:
        refs = [
            _gpu_ids.options(
                num_gpus=len(devices),
                num_cpus=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote()
            for index, devices in enumerate(slots)
        ]
        gpu_ids = list(ray.get(refs, timeout=_RESERVE_TIMEOUT_S))
    return [
        Node(hosts[table[index]], tuple(devices), ids)
        for index, (devices, ids) in enumerate(zip(slots, gpu_ids, strict=True))
    ]


@ray.remote
def _gpu_ids() -> tuple[str, ...]:
    """Return the IDs of the GPUs that Ray assigned to this bundle."""
    return tuple(str(number) for number in ray.get_gpu_ids())
