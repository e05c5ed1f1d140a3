"""Checks of the machine apart from GPUs: disk, memory, network, limits, the sandbox, and imports of engines."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.reward_table import shipped_name
from roll_gspo.config.sft import AnyConfig
from roll_gspo.doctor.findings import Findings, error, ok, warning
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.disk import checkpoint_bytes, checkpoints_folder, disk_warnings
from roll_gspo.pipelines.memory import GIB, state_bytes_of_machine
from roll_gspo.pipelines.pretrain import HUB_NAME
from roll_gspo.sandbox import Sandbox

IMPORT_TIMEOUT_S = 240.0
_HUB_TIMEOUT_S = 15.0
_CONNECT_TIMEOUT_S = 5.0
_SHARED_MEMORY = Path("/dev/shm")
_MIN_SHARED_BYTES, _GOOD_SHARED_BYTES = 256 << 20, 4 << 30
_MIN_OPEN_FILES = 4096
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def disk_findings(config: AnyConfig) -> Findings:
    """Compare free disk space with the checkpoints of the run. Too little for one is an error of the preflight."""
    yield from (warning(text) for text in disk_warnings(config))
    key, folder = checkpoints_folder(config)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free / GIB, checkpoint_bytes(config)
    if needed is None:
        yield ok(f"{key}: {folder} has {free:.3g} GiB free for checkpoints of unknown size")
    elif free >= needed / GIB:
        yield ok(f"{key}: {folder} has {free:.3g} GiB free for checkpoints of about {needed / GIB:.3g} GiB")


def shared_memory_findings(config: AnyConfig, path: Path = _SHARED_MEMORY) -> Findings:
    """Check that processes can exchange data in shared memory: Ray's objects, NCCL, and workers of vLLM."""
    if not path.is_dir():
        yield ok(f"no {path} on this system")
        return
    usage = shutil.disk_usage(path)
    text = f"{path} has {usage.free / GIB:.3g} of {usage.total / GIB:.3g} GiB free"
    several = config.execution == "ray"
    fix = "in a container start it with --shm-size=16g or --ipc=host"
    if several and usage.free < _MIN_SHARED_BYTES:
        yield error(f"{text}, too little for execution: ray; {fix}")
    elif several and usage.free < _GOOD_SHARED_BYTES:
        yield warning(f"{text}; Ray puts larger batches on disk, which is slow; {fix}")
    else:
        yield ok(text)


def main_memory_findings(config: AnyConfig, on_cuda: bool | None) -> Findings:
    """Compare free main memory with the plan's estimate, if the roles compute on CPUs."""
    available = psutil.virtual_memory().available
    text = f"{available / GIB:.3g} GiB of main memory are available"
    needed = state_bytes_of_machine(config)
    if on_cuda is not False or needed is None:
        yield ok(text)
        return
    estimate = f"weights, gradients and optimizer take about {needed / GIB:.3g} GiB"
    if needed > available:
        yield error(f"{text}, and {estimate}; end other processes, or choose a smaller model")
    else:
        yield ok(f"{text}; {estimate}")


def network_findings(environ: Mapping[str, str] = os.environ) -> Findings:
    """Check that sockets can be opened, and that the interfaces in the environment exist."""
    interfaces = psutil.net_if_addrs()
    for name in _INTERFACES:
        wanted = environ.get(name, "").lstrip("=^").split(",")
        if missing := [part for part in wanted if part and not any(have.startswith(part) for have in interfaces)]:
            yield error(f"{name}: no interface '{missing[0]}' (there are {', '.join(interfaces)}); correct or unset it")
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_TIMEOUT_S):
                pass
    except OSError as problem:
        yield error(f"127.0.0.1: no port can be opened ({problem}); allow local sockets, end processes that hold ports")
        return
    yield ok(f"ports of 127.0.0.1 can be opened, interfaces {', '.join(interfaces)}")


def cluster_findings(config: AnyConfig, environ: Mapping[str, str] = os.environ) -> Findings:
    """Check that the head of the Ray cluster of RAY_ADDRESS answers; without one the run starts Ray here."""
    if config.execution == "local":
        yield ok("not used (execution: local)")
        return
    address = environ.get("RAY_ADDRESS", "local")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "local":
        yield ok("no RAY_ADDRESS: the run joins a Ray of this machine or starts one")
        return
    if not host or not port.isdigit():
        yield error(f"RAY_ADDRESS: {address} is not HOST:PORT; write it so, e.g. 10.0.0.1:6379, or unset it")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as problem:
        yield error(f"RAY_ADDRESS: {address} does not answer ({problem}); run ray start --head there, or open the port")
        return
    yield ok(f"the Ray head at {address} answers")


def limit_findings() -> Findings:
    """Check limits of this user that long runs reach."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        yield warning(f"{soft} open files per process; run ulimit -n {min(max(hard, soft), 65536)} before the command")
    else:
        yield ok(f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} open files per process")


def sandbox_findings(config: AnyConfig) -> Findings:
    """Run a program in the sandbox if a reward of the configuration does."""
    blocks = config.rewards.items() if isinstance(config, ExperimentConfig) else ()
    users = [name for name, block in blocks if "code_sandbox" in map(shipped_name, block.workers.values())]
    if not users:
        yield ok("not used by this configuration")
        return
    with Sandbox() as sandbox, sandbox.start("print(input())") as program:
        outcome = program.run("alive")
    if outcome.stdout.strip() == "alive":
        yield ok(f"isolates programs for rewards.{', rewards.'.join(users)}")
    else:
        yield error(f"rewards.{users[0]}: a program answered {outcome}; run python -m roll_gspo.rewards try")


def hub_findings(config: AnyConfig) -> Findings:
    """Check that models on the Hugging Face hub are in the local cache or can be downloaded."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    names = {model_of(config, role) for role in config.roles().values()}
    for name in sorted(name for name in names if HUB_NAME.fullmatch(name) and not Path(name).exists()):
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            yield ok(f"{name} is in the cache of the Hugging Face hub")
            continue
        try:
            HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        except (HfHubHTTPError, OSError, RuntimeError) as problem:
            first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            yield error(f"{name}: the Hugging Face hub does not offer it ({first}); download it and name its folder")
        else:
            yield ok(f"{name} will be downloaded from the Hugging Face hub")


def import_findings(config: AnyConfig) -> Findings:
    """Import every engine in a separate process."""
    engines = {
        args.strategy_name: args.requirement.probe or args.requirement.module
        for args in (role.strategy_args for role in config.roles().values())
        if args.requirement is not None
    }
    for module in sorted(set(engines.values())):
        names = ", ".join(sorted(name for name, other in engines.items() if other == module))
        seconds, reason = _import(module)
        if reason:
            yield error(f"{names}: import {module} fails ({reason}); reinstall its packages")
        else:
            yield ok(f"{names}: imported in {seconds:.0f} s")


def _import(module: str) -> tuple[float, str]:
    """Return the seconds of an import, and the last line of its error or an empty text."""
    started = time.monotonic()
    code = f"import importlib, sys; sys.path[:0] = {sys.path!r}; importlib.import_module({module!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{module}: not imported within {IMPORT_TIMEOUT_S:g} s; look at the disk and the CPU"
        ) from None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return time.monotonic() - started, lines[-1] if done.returncode else ""
