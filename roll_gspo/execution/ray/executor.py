"""Roles as groups of Ray actors, on an existing cluster or on a local Ray that ends with the run."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import roll_gspo
from roll_gspo.execution.base import Closeable, Devices, ExecutionSettings, RemoteRole, RoleT
from roll_gspo.execution.local import close_all
from roll_gspo.execution.ray.cluster import Cluster
from roll_gspo.execution.ray.group import RayGroup

# Prefixes of the controller's environment variables that workers on every machine need.
_FORWARDED = (
    *("CUBLAS_", "CUBLASLT_", "CUDA_DEVICE_", "CUDA_LAUNCH_", "CUDA_MODULE_", "CUDNN_", "FLASHINFER_", "FLASH_"),
    *("GLOO_", "HF_", "NCCL_", "NVIDIA_TF32_", "NVTE_", "OMP_", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TORCHDYNAMO_"),
    *("TORCHINDUCTOR_", "TRANSFORMERS_", "TRITON_", "VLLM_"),
)


class RayExecutor:
    """`ClusterExecutor` on Ray.

    Args:
        settings: devices, limits and environment of the run.

    Raises:
        ConfigError: a cluster is needed and not found, or it has too few devices.
    """

    def __init__(self, settings: ExecutionSettings) -> None:
        self._cluster = Cluster(settings)
        defaults = {"OMP_WAIT_POLICY": "passive"}
        if not self._cluster.uses_gpus:
            defaults["OMP_NUM_THREADS"] = "1"
        self._settings = replace(settings, environment=defaults | _forwarded() | dict(settings.environment))
        self._roles: list[tuple[str, Closeable]] = []

    @property
    def uses_gpus(self) -> bool:
        """True if devices are GPUs."""
        return self._cluster.uses_gpus

    def start(self, name: str, make: Callable[[], RoleT], devices: Devices | None = None) -> RoleT:
        """Build a role; with devices it runs as a group and is used like one object."""
        if devices is None:
            role = make()
            self._roles.append((name, role))
            return role
        return cast(RoleT, RemoteRole(self.start_group(name, make, devices, one_world=True)))

    def start_group(
        self,
        name: str,
        make: Callable[[], Closeable],
        devices: Devices,
        *,
        one_world: bool,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> RayGroup:
        """Build one object per worker, as ranks of one world or as replicas."""
        settings = replace(self._settings, environment={**environment, **self._settings.environment})
        group = RayGroup(name, make, devices, one_world, self._cluster, settings)
        self._roles.append((name, group))
        return group

    def close(self) -> None:
        """Close every role in reverse order of start, then disconnect from the cluster."""
        try:
            close_all(self._roles)
        finally:
            self._cluster.close()


def _forwarded() -> dict[str, str]:
    kept: dict[str, Any] = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    package = Path(roll_gspo.__file__).parents[1]
    if str(package) not in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]):
        paths.insert(0, str(package))  # a checkout
    return kept | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
