"""Memory of the GPUs: from the configuration, from the driver, or assumed."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from typing import NamedTuple

from roll_gspo.config.sft import AnyConfig

ASSUMED_GB = 80.0
_QUERY = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")


class GpuMemory(NamedTuple):
    """Memory of each GPU in GiB, and where the number comes from: `gpu_memory_gb`, `nvidia-smi` or `assumed`."""

    gib: float
    source: str

    @property
    def is_known(self) -> bool:
        """False if the number is assumed."""
        return self.source != "assumed"

    @property
    def text(self) -> str:
        """Return e.g. `80 GiB (assumed; set gpu_memory_gb)`."""
        return f"{self.gib:.4g} GiB ({self.source if self.is_known else 'assumed; set gpu_memory_gb'})"


def gpu_memory(config: AnyConfig, on_cuda: bool | None) -> GpuMemory:
    """Return the memory of each GPU.

    Args:
        config: the whole configuration.
        on_cuda: True if this machine's GPUs are used.
    """
    if config.gpu_memory_gb is not None:
        return GpuMemory(config.gpu_memory_gb, "gpu_memory_gb")
    found = detected_gb() if on_cuda else None
    return GpuMemory(ASSUMED_GB, "assumed") if found is None else GpuMemory(found, "nvidia-smi")


@cache
def detected_gb() -> float | None:
    """Return the memory of the smallest GPU of this machine in GiB, or None if the driver does not report it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        result = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=20, check=True)
        return min(float(line) for line in result.stdout.split()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
