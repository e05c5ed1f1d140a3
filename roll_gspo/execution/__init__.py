"""Executors: roles run in this process or as Ray actors."""

from roll_gspo.registry import Registry

EXECUTORS = Registry(
    "execution",
    {
        "local": "roll_gspo.execution.local:LocalExecutor",
        "ray": "roll_gspo.execution.ray.executor:RayExecutor",
    },
)
