"""The GPUs of this machine by `nvidia-smi`, and whether they suffice for a configuration."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from roll_gspo.config.sft import AnyConfig
from roll_gspo.doctor.findings import Finding, Findings, error, not_checked, ok, warning
from roll_gspo.doctor.versions import cuda_of_torch
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.devices import devices_of, devices_per_node, ranges
from roll_gspo.pipelines.memory import estimate_memory

_QUERY = "index,uuid,name,memory.total,memory.used,compute_cap,driver_version,compute_mode"
_TIMEOUT_S = 30.0
_BF16 = (8, 0)  # compute capability
_MIB = 2**20

RunTool = Callable[[Sequence[str]], str]
"""Runs `nvidia-smi` with arguments and returns its output."""


@dataclass(frozen=True)
class Gpu:
    """A GPU; memory is in MiB."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    capability: tuple[int, int]
    compute_mode: str


@dataclass(frozen=True)
class Inventory:
    """The GPUs of a machine.

    Attributes:
        driver: version of the driver.
        cuda: newest CUDA version that the driver supports; None if unknown.
        gpus: all GPUs, by index.
        links: kind of connection by pair of indices, e.g. `NV18` (NVLink), `PIX` or `SYS`.
    """

    driver: str
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    links: Mapping[frozenset[int], str] = field(default_factory=dict)

    def visible(self, environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
        """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
        wanted = environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return self.gpus
        found = []
        for name in (part.strip() for part in wanted.split(",")):
            match = [g for g in self.gpus if name == str(g.index) or (len(name) > 4 and g.uuid.startswith(name))]
            if len(match) != 1:
                break  # CUDA ignores everything after a name that it does not know
            found += match
        return tuple(found)


def nvidia_smi(arguments: Sequence[str]) -> str:
    """Run `nvidia-smi`.

    Raises:
        ConfigError: it is missing, fails or does not end.
    """
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError as missing:
        raise ConfigError(
            "/dev/nvidia*: this machine has GPUs, but no nvidia-smi; install the NVIDIA driver's tools, in a "
            "container start it with --gpus all"
        ) from missing
    except subprocess.TimeoutExpired as hung:
        raise ConfigError(
            f"nvidia-smi: no answer within {_TIMEOUT_S:g} s; a GPU has failed (see dmesg), restart the machine"
        ) from hung
    if done.returncode:
        said = (done.stdout or done.stderr).strip().splitlines()
        raise ConfigError(f"nvidia-smi: failed ({said[0] if said else done.returncode}); repair the NVIDIA driver")
    return done.stdout


def read_inventory(run: RunTool = nvidia_smi) -> Inventory:
    """Ask the driver for GPUs and their connections.

    Raises:
        ConfigError: the driver does not answer, or in another way than expected.
    """
    rows = [line.split(", ") for line in run([f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]).splitlines()]
    try:
        gpus = tuple(_gpu(row) for row in rows)
        driver = rows[0][6].strip()
    except (IndexError, ValueError) as unreadable:
        raise ConfigError(f"nvidia-smi: answered {rows[:1]}, which cannot be read; update the driver") from unreadable
    return Inventory(driver, parse_cuda(run([])), gpus, parse_topology(run(["topo", "-m"])) if len(gpus) > 1 else {})


def _gpu(row: Sequence[str]) -> Gpu:
    major, _, minor = row[5].strip().partition(".")
    total, used = (int(row[column]) for column in (3, 4))
    return Gpu(int(row[0]), row[1].strip(), row[2].strip(), total, used, (int(major), int(minor)), row[7].strip())


def parse_cuda(text: str) -> tuple[int, int] | None:
    """Return the CUDA version in the table that `nvidia-smi` prints."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def parse_topology(text: str) -> dict[frozenset[int], str]:
    """Return the connections in the matrix of `nvidia-smi topo -m`."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    table = [[cell.strip() for cell in line.split("\t")] for line in lines]
    header = next((row for row in table if "GPU0" in row and row[0] != "GPU0"), [])
    links = {}
    for row in table:
        if not re.fullmatch(r"GPU\d+", row[0]):
            continue
        for name, cell in zip(header, row, strict=False):
            if re.fullmatch(r"GPU\d+", name) and name != row[0]:
                links[frozenset((int(row[0][3:]), int(name[3:])))] = cell
    return links


def gpu_findings(config: AnyConfig, inventory: Inventory, environ: Mapping[str, str] = os.environ) -> Findings:
    """Compare the GPUs that this process sees with the devices, types and memory of the roles."""
    gpus = inventory.visible(environ)
    cuda = "unknown" if inventory.cuda is None else ".".join(map(str, inventory.cuda))
    kinds = {(gpu.name, gpu.total, gpu.capability) for gpu in gpus}
    texts = [f"{name}, {total} MiB, compute capability {c[0]}.{c[1]}" for name, total, c in sorted(kinds)]
    yield ok(f"{len(gpus)} × {' and '.join(texts) or 'none visible'}; driver {inventory.driver}, CUDA {cuda}")
    yield from _driver_findings(inventory, cuda_of_torch())
    yield from _device_findings(config, gpus)
    yield from _memory_findings(config, gpus)
    yield from _link_findings(config, inventory, gpus)


def _driver_findings(inventory: Inventory, built_for: tuple[int, int] | None) -> Iterator[Finding]:
    if built_for is None:
        yield error(
            "torch is built for CPUs; install its CUDA build: pip install --force-reinstall -r requirements.txt"
        )
        return
    if inventory.cuda is None or inventory.cuda >= built_for:
        return
    needed, offered = (".".join(map(str, version)) for version in (built_for, inventory.cuda))
    text = f"torch is built for CUDA {needed}, and the driver supports {offered}"
    if inventory.cuda[0] < built_for[0]:
        yield error(f"{text}; update the driver, or install a torch for CUDA {inventory.cuda[0]}")
    else:
        yield warning(f"{text}; update the driver if a kernel is reported missing")


def used_devices(config: AnyConfig) -> dict[int, list[str]]:
    """Return the roles on every device of a machine, by its number there; machines with more roles come first."""
    if config.execution == "local":
        return {0: list(config.roles())}
    nodes: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    per_node = devices_per_node(config)
    for name, role in config.roles().items():
        for device in devices_of(role):
            nodes[device // per_node][device % per_node].append(name)
    return dict(max(nodes.values(), key=len))


def _device_findings(config: AnyConfig, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    used = used_devices(config)
    if max(used) >= len(gpus):
        yield error(
            f"the roles use device(s) {ranges(tuple(sorted(used)))} of a machine, and {len(gpus)} GPU(s) are visible; "
            "set device_mapping and num_gpus_per_node, or CUDA_VISIBLE_DEVICES"
        )
    if len({(gpu.name, gpu.total) for gpu in gpus}) > 1:
        yield warning("the GPUs differ, and the slowest one sets the pace; choose equal ones with CUDA_VISIBLE_DEVICES")
    for name, role in config.roles().items():
        dtype = role.model_args.dtype
        if dtype == "bf16" and any(gpu.capability < _BF16 for gpu in gpus):
            yield error(f"{name}.model_args.dtype: bf16 needs compute capability 8.0 or above; set fp16 or fp32")
        if role.strategy_args.needs_16_bits_on_gpus and dtype == "fp32":
            engine = role.strategy_args.strategy_name
            yield warning(f"{name}.model_args.dtype: the fast kernels of {engine} need 16 bits (fp32); set bf16")
    processes = 1 if config.execution == "local" else max(len(roles) for roles in used.values())
    if processes > 1 and any(gpu.compute_mode == "Exclusive_Process" for gpu in gpus):
        yield error(
            f"{processes} roles share a GPU in compute mode Exclusive_Process; run nvidia-smi -c DEFAULT as root"
        )


def _memory_findings(config: AnyConfig, visible: Sequence[Gpu]) -> Iterator[Finding]:
    gpus = [visible[device] for device in used_devices(config) if device < len(visible)]
    if not gpus:
        return
    for name, role in config.roles().items():
        share = role.strategy_args.gpu_memory_share
        if share is not None and (small := min((gpu.total - gpu.used) / gpu.total for gpu in gpus)) < share:
            yield error(
                f"{name}.strategy_args.strategy_config.gpu_memory_utilization: {share} of a GPU, but only {small:.2f} "
                "of one is free; lower it, or end the other processes (nvidia-smi shows them)"
            )
    total, free = min(gpu.total for gpu in gpus), min(gpu.total - gpu.used for gpu in gpus)
    memory = estimate_memory(config, total * _MIB)
    if memory is None:
        yield not_checked("the size of the model is unknown until it is downloaded")
        return
    phase, device = memory.fullest()
    needed = memory.total(phase, device) / _MIB
    estimate = f"about {needed:.0f} MiB on a GPU while {phase}"
    if needed > total:
        yield error(f"{estimate}, and a GPU has {total} MiB; --dry-run names the nearest settings that fit")
    elif needed > free:
        users = ", ".join(
            f"GPU {gpu.index} has {gpu.total - gpu.used} MiB" for gpu in gpus if gpu.total - gpu.used < needed
        )
        yield error(f"{estimate}, but free are less ({users}); end the other processes (nvidia-smi shows them)")
    else:
        yield ok(f"{estimate}, {free} MiB are free")


def _link_findings(config: AnyConfig, inventory: Inventory, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    pairs = [frozenset((one.index, other.index)) for one, other in combinations(gpus, 2)]
    kinds = {inventory.links[pair] for pair in pairs if pair in inventory.links}
    if not kinds:
        return
    slow = sorted(kind for kind in kinds if not kind.startswith("NV"))
    if not slow:
        yield ok(f"all GPUs are connected by NVLink ({', '.join(sorted(kinds))})")
        return
    sizes = [size for role in config.roles().values() for size in role.strategy_args.model_parallel_sizes.values()]
    text = f"some GPUs are connected by {', '.join(slow)}, not by NVLink"
    if max(sizes, default=1) > 1:
        yield warning(f"{text}; parallel sizes above 1 are slow between them, see nvidia-smi topo -m")
    else:
        yield ok(text)
