"""The kinds of weight update: what the tensors are that a trainer sends."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from roll_gspo.errors import WeightTransferError

FULL_MODEL = "full"
"""All tensors of the model under their Hugging Face names, each once."""

ADAPTER = "adapter"
"""All tensors of a LoRA adapter under PEFT's names, each once. The other weights are those of the checkpoint."""

PROBE = "probe"
"""One known tensor, sent when the members connect. It changes no weight and shows that the backend delivers bytes."""

CONNECTING = -1
"""Stands for the version while members connect."""

_CONTENTS = {FULL_MODEL: "all weights of the model", ADAPTER: "LoRA adapters"}


@runtime_checkable
class KindOfUpdate(Protocol):
    """A source of weights that says what it yields."""

    @property
    def kind(self) -> str:
        """`FULL_MODEL` or `ADAPTER`."""
        ...


def kind_of(source: object) -> str:
    """Return the kind of update that a source of weights is for: its `kind`, or `FULL_MODEL` if it has none."""
    return source.kind if isinstance(source, KindOfUpdate) else FULL_MODEL


def probe_tensor(device: torch.device | str = "cpu") -> Tensor:
    """Return the tensor of a `PROBE`, [4096] float32."""
    return torch.arange(4096, dtype=torch.float32, device=device) + 0.5


def check_kind(kind: str, taken: str = FULL_MODEL) -> None:
    """Check that an engine can apply a kind of update.

    Args:
        kind: kind of the update.
        taken: the only kind that the engine applies.

    Raises:
        WeightTransferError: the engine was built for another kind, or the kind is unknown here.
    """
    if kind == taken:
        return
    if kind not in _CONTENTS:
        raise WeightTransferError(
            f"weight transfer: updates of kind '{kind}' are unknown to this engine, which takes '{taken}'; run "
            "trainer and engines with the same version of roll_gspo"
        )
    raise WeightTransferError(
        f"weight transfer: the trainer sends {_CONTENTS[kind]} (kind '{kind}'), but the engine was built for "
        f"{_CONTENTS[taken]} (kind '{taken}'); build both with the same actor_train.model_args.lora and sync"
    )
