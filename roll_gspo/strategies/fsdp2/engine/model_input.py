"""Layout of a micro-batch in the input of a transformers model: padded or packed.

Legend: B samples, S positions, T response positions, P tokens of all samples, K positions whose output is computed, N
response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, moved
from roll_gspo.strategies.log_probs import place
from roll_gspo.strategies.transformers_model import predicting_rows


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch as the model reads it.

    Attributes:
        input_ids: [B, S], or [1, P] if samples are packed.
        position_ids: [1, P] position of each token in its sample; None if samples are padded.
        lengths: tokens of each packed sample; empty if samples are padded.
        kept: [K] positions of a row whose output is computed.
        rows: (row, index in `kept`) of the outputs that predict response tokens, both [N].
        places: (sample, response position) of the predicted tokens, both [N].
        tokens: [N] predicted tokens.
        shape: (B, T).
    """

    input_ids: Tensor
    position_ids: Tensor | None
    lengths: tuple[int, ...]
    kept: Tensor
    rows: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    tokens: Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device) -> ModelInput:
        """Return the same input on `device`."""
        positions = [] if self.position_ids is None else [self.position_ids]
        copies = moved([self.input_ids, self.kept, *self.rows, *self.places, self.tokens, *positions], device)
        rows, places = (copies[2], copies[3]), (copies[4], copies[5])
        position_ids = copies[7] if positions else None
        return ModelInput(copies[0], position_ids, self.lengths, copies[1], rows, places, copies[6], self.shape)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""
        # padding needs no mask: attention is causal, and padding is on the right
        found: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False, "logits_to_keep": self.kept}
        if self.position_ids is not None:
            found |= {"position_ids": self.position_ids, "sample_lengths": self.lengths}
        return found

    def place(self, values: Tensor) -> Tensor:
        """Scatter values [N] into [B, T]; 0 elsewhere."""
        return place(values, self.places, self.shape)


def model_input(sequences: Sequences, *, packed: bool) -> ModelInput:
    """Lay out samples for a model.

    Args:
        sequences: the samples, on the CPU. On a GPU every length would cost a wait for the device.
        packed: concatenate samples without padding; else keep the padding.
    """
    places, positions = predicting_rows(sequences)
    tokens, (size, width) = sequences.response_ids[places], sequences.response_mask.shape
    if not packed:
        first, last = torch.stack(positions.aminmax()).tolist() if len(positions) else (0, 0)
        kept = torch.arange(first, last + 1)
        rows = (places[0], positions - first)
        return ModelInput(sequences.input_ids, None, (), kept, rows, places, tokens, (size, width))
    lengths = sequences.lengths.tolist()
    starts = torch.tensor([0, *accumulate(lengths)])[:-1]
    flat = torch.cat([row[:length] for row, length in zip(sequences.input_ids, lengths, strict=True)])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    kept = starts[places[0]] + positions
    rows = (torch.zeros_like(kept), torch.arange(len(kept)))
    return ModelInput(flat[None], position_ids[None], tuple(lengths), kept, rows, places, tokens, (size, width))
