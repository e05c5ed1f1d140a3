"""Warnings of the plan about where the roles run. A warning is a setting that runs but is probably not intended."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem, Schema, used_only_with
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.pipelines.devices import machines_of

RAY_ONLY = ("worker_timeout_s", "max_worker_restarts", "max_restarts", "num_nodes", "weight_transfer")


def execution_warnings(config: AnyConfig) -> Iterator[Problem]:
    """Yield machines that stay idle, and keys that only `execution: ray` reads."""
    if config.execution == "ray":
        nodes = machines_of(config)
        if config.num_nodes is not None and config.num_nodes > nodes:
            yield Problem(
                "num_nodes",
                f"{config.num_nodes} machines, but the device mappings use {nodes}; name devices of the others, or set "
                "num_nodes: null",
            )
        return
    for key in RAY_ONLY:
        if config.model_dump()[key] != _default_of(key):
            yield used_only_with(key, "execution", "ray")


def _default_of(key: str) -> object:
    default = RunConfig.model_fields[key].default
    return default.model_dump() if isinstance(default, Schema) else default
