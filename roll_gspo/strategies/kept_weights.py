"""Weights for receivers that keep references to the tensors of a `WeightSource`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roll_gspo.strategies.base import WeightSource


class KeptWeights:
    """A `WeightSource` whose tensors stay valid after the next one is yielded: contiguous copies of another source.

    vLLM 0.32 keeps references while it packs tensors for NCCL and, without packing, for CUDA IPC. A source that reuses
    memory, e.g. an export of split parameters, would deliver its last tensor under several names. A receiver holds at
    most its own buffer of copies; without packing this is the whole model.

    Copies are made on the current stream. A receiver that alternates streams (vLLM's NCCL transfer with
    `packed_num_buffers` above 1) could still read memory that the next export of another stream overwrites.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source:
            # `contiguous` copies only if it must, and a view of reused memory may be contiguous
            yield name, tensor.detach().clone(memory_format=torch.contiguous_format)
