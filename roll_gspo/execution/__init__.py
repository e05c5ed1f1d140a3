"""Where roles live: in this process, or (in a later version) as Ray actors."""

from roll_gspo.registry import Registry

EXECUTORS = Registry("execution", {"local": "roll_gspo.execution.local:LocalExecutor"})
