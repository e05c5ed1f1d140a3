"""Peak memory of a sharded trainer by category, on every rank of a world."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from engine_cases import model_setup, optimizer_setup, policy_loss, sequences, train_batch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType

from roll_gspo.strategies.fsdp2.config import Fsdp2Config

GATHERED = ("Unsharded Param", "All Gather", "Unsharded Grad", "Reduce Scatter")
STATE = ("Sharded Param", "Sharded Grad")  # the tracker counts temporary tensors of the optimizer as its state


class _Peaks(FSDPMemTracker):
    """torch's tracker, which also keeps the largest sum of some categories."""

    def __init__(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(module, optimizer)
        self.peaks: dict[str, int] = defaultdict(int)

    def _update_snap(self, *args: Any, **kwargs: Any) -> None:
        super()._update_snap(*args, **kwargs)
        for of_device in self._curr_mem_snap.values():
            now = {kind.value: size for kind, size in of_device.items() if isinstance(kind, _FSDPRefType)}
            for name, kinds in (("gathered", GATHERED), ("state", STATE)):
                self.peaks[name] = max(self.peaks[name], sum(now.get(kind, 0) for kind in kinds))


def peaks(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the peaks of an update and of a score, in bytes."""
    from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train

    engine = Fsdp2Train(model_setup(folder, dtype), optimizer_setup(), Fsdp2Config(**options))
    engine.update(train_batch(1).split(3), policy_loss, True)  # allocates the optimizer's state
    found = {}
    for name, work in (
        ("update", lambda: engine.update(train_batch(2).split(3), policy_loss, True)),
        ("score", lambda: engine.score(sequences())),
    ):
        with _Peaks(engine._model.module, engine._trainer._optimizer) as tracker:
            work()
        found[name] = dict(tracker.peaks)
    found["update"]["state"] += sum(tensor.nbytes for tensor in engine._trainer._training_tensors() if tensor.dim())
    return found
