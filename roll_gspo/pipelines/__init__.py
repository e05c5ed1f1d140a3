"""Training loops by name."""

from roll_gspo.registry import Registry

PIPELINES = Registry("pipeline", {"rlvr": "roll_gspo.pipelines.rlvr:run", "sft": "roll_gspo.pipelines.sft:run"})
