"""GPUs as `nvidia-smi` describes them (written by hand), compared with configurations. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from composed import load_config

from roll_gspo.config.sft import AnyConfig
from roll_gspo.doctor import gpus as module
from roll_gspo.doctor.findings import Status
from roll_gspo.doctor.gpus import Inventory, gpu_findings, parse_cuda, parse_topology, read_inventory, used_devices
from roll_gspo.errors import ConfigError

RAY = ("execution=ray", "num_gpus_per_node=8")
QUERY = "{index}, GPU-{index}c3f0b2e-8d21-4a57, NVIDIA H200, 143771, {used}, 9.0, 580.159.04, {mode}\n"
TABLE = """Fri Nov 27 12:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
"""


def topology(size: int, far: str = "NV18") -> str:
    """The matrix of `nvidia-smi topo -m`; GPUs of the two halves are connected by `far`."""
    names = [f"GPU{i}" for i in range(size)]
    header = "\t" + "\t".join(f"\x1b[4m{name}" for name in names) + "\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m"
    rows = [header]
    for i in range(size):
        cells = [" X " if i == j else "NV18" if (i < size // 2) == (j < size // 2) else far for j in range(size)]
        rows.append("\t".join([names[i], *cells, "PXB", "0-47", "0"]))
    return "\n".join(
        [*rows, "", "Legend:", "", "  X    = Self", "  NV#  = Connection traversing a bonded set of # NVLinks"]
    )


def tool(size: int, used: int = 4, far: str = "NV18", mode: str = "Default") -> Callable[[Sequence[str]], str]:
    """An `nvidia-smi` of a machine with H200 GPUs."""

    def run(arguments: Sequence[str]) -> str:
        if not arguments:
            return TABLE
        if arguments[0] == "topo":
            return topology(size, far)
        return "".join(QUERY.format(index=i, used=used, mode=mode) for i in range(size))

    return run


@pytest.fixture(autouse=True)
def _cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_of_torch", lambda: (13, 0))


def config_of(*overrides: str, example: str = "qwen2.5_7b_gspo") -> AnyConfig:
    return load_config(example, *overrides).config


def found(config: AnyConfig, inventory: Inventory, environ: dict[str, str] | None = None) -> dict[Status, str]:
    """The texts of the findings, by status."""
    texts: dict[Status, str] = {}
    for finding in gpu_findings(config, inventory, environ or {}):
        texts[finding.status] = "\n".join(filter(None, [texts.get(finding.status), finding.text]))
    return texts


def test_inventory_is_read() -> None:
    inventory = read_inventory(tool(8, far="SYS"))
    assert (inventory.driver, inventory.cuda, len(inventory.gpus)) == ("580.159.04", (13, 0), 8)
    gpu = inventory.gpus[3]
    assert (gpu.index, gpu.name, gpu.total, gpu.used, gpu.capability) == (3, "NVIDIA H200", 143771, 4, (9, 0))
    assert inventory.links[frozenset((0, 3))] == "NV18" and inventory.links[frozenset((0, 4))] == "SYS"
    assert len(inventory.links) == 28
    assert read_inventory(tool(1)).links == {}
    assert parse_cuda("CUDA UMD Version : 13.1") == (13, 1) and parse_cuda("NVIDIA-SMI") is None
    assert parse_topology("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n") == {frozenset((0, 1)): "PHB"}


def test_unreadable_answer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_inventory(lambda arguments: "No devices were found\n")


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2, 3]), ("", []), ("2,0", [2, 0]), ("GPU-1c3f", [1]), ("1,7,2", [1]), ("-1", [])],
)
def test_visible_devices(visible: str | None, indices: list[int]) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert [gpu.index for gpu in read_inventory(tool(4)).visible(environ)] == indices


def test_machine_that_fits_has_no_problem() -> None:
    texts = found(config_of(*RAY), read_inventory(tool(8)))
    assert texts.keys() == {Status.OK}
    for part in ("8 × NVIDIA H200, 143771 MiB, compute capability 9.0", "CUDA 13.0", "MiB are free", "NVLink (NV18)"):
        assert part in texts[Status.OK]


def test_too_few_devices_and_slow_links() -> None:
    texts = found(config_of(*RAY), read_inventory(tool(4, far="SYS")))
    assert "device(s) 0-7 of a machine, and 4 GPU(s) are visible" in texts[Status.ERROR]
    assert "connected by SYS, not by NVLink" in texts[Status.WARNING]
    hidden = found(config_of(*RAY), read_inventory(tool(8)), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "2 GPU(s) are visible" in hidden[Status.ERROR]


def test_memory_is_compared_with_the_plan() -> None:
    busy = found(config_of(*RAY), read_inventory(tool(8, used=140_000)))
    assert "GPU 0 has 3771 MiB" in busy[Status.ERROR] and "end the other processes" in busy[Status.ERROR]
    assert "gpu_memory_utilization: 0.8 of a GPU, but only 0.03 of one is free" in busy[Status.ERROR]
    inventory = read_inventory(tool(8))
    small = replace(inventory, gpus=tuple(replace(gpu, total=8192) for gpu in inventory.gpus))
    assert "a GPU has 8192 MiB; --dry-run names" in found(config_of(*RAY), small)[Status.ERROR]


@pytest.mark.parametrize(
    ("built_for", "status", "text"),
    [
        (None, Status.ERROR, "torch is built for CPUs"),
        ((14, 0), Status.ERROR, "built for CUDA 14.0, and the driver supports 13.0; update the driver"),
        ((13, 2), Status.WARNING, "built for CUDA 13.2"),
    ],
)
def test_torch_and_driver(
    built_for: tuple[int, int] | None, status: Status, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cuda_of_torch", lambda: built_for)
    assert text in found(config_of(*RAY), read_inventory(tool(8)))[status]


def test_old_and_exclusive_gpus() -> None:
    inventory = read_inventory(tool(2, mode="Exclusive_Process"))
    old = replace(inventory, gpus=tuple(replace(gpu, capability=(7, 0)) for gpu in inventory.gpus))
    shared = config_of("execution=ray", "actor_train.model_args.dtype=bf16", example="example_gspo")
    texts = found(shared, old)
    assert "actor_train.model_args.dtype: bf16 needs compute capability 8.0" in texts[Status.ERROR]
    assert "3 roles share a GPU in compute mode Exclusive_Process" in texts[Status.ERROR]
    assert "actor_infer.model_args.dtype" in texts[Status.WARNING]


def test_devices_of_the_fullest_machine_count() -> None:
    used = used_devices(config_of(example="qwen3_30b_a3b_gspo"))
    assert used.keys() == set(range(8))
    assert used_devices(config_of(example="example_gspo")).keys() == {0}
