"""Layout of a micro-batch in the input of this rank's model: padded or packed, split over context ranks.

Legend: B samples, T response positions, P positions of this rank, N of its positions that predict a response token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from roll_gspo.batch import Sequences, moved
from roll_gspo.strategies.megatron.engine.parallel import context_group


@dataclass
class PackedSamples(PackedSeqParams):
    """Packed samples of this context rank, with what every layer needs to know about them.

    Lengths are known on the host, so that no layer waits for the device.

    Attributes:
        lengths: tokens of each sample on this rank.
        positions: [P] position of each token in its sample.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class PackedLayout:
    """A micro-batch in megatron's layout.

    Attributes:
        input_ids: [B, P], or [1, P] if samples are packed.
        packed: the packed samples; None if they are padded.
        rows: (position, row) of the hidden states [P, B, H] that predict response tokens, both [N].
        places: (sample, response position) of the predicted tokens, both [N].
        tokens: [N] predicted tokens.
        shape: (B, T).
    """

    input_ids: Tensor
    packed: PackedSamples | None
    rows: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    tokens: Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device) -> PackedLayout:
        """Return the same layout on `device`."""
        packed = self.packed
        of_packed = () if packed is None else (packed.cu_seqlens_q, packed.positions)
        copies = moved([self.input_ids, *self.rows, *self.places, self.tokens, *of_packed], device)
        if packed is not None:
            ends, positions = copies[6:]
            packed = replace(packed, cu_seqlens_q=ends, cu_seqlens_kv=ends, positions=positions)
        rows, places = (copies[1], copies[2]), (copies[3], copies[4])
        return PackedLayout(copies[0], packed, rows, places, copies[5], self.shape)

    def place(self, values: Tensor) -> Tensor:
        """Scatter values [N] of this rank into [B, T], 0 elsewhere, and add those of the other context ranks.

        Every context rank computes the same from the result, so the gradient of each rank's own values needs no
        reduction.
        """
        placed = values.new_zeros(self.shape)
        placed[self.places] = values
        group = context_group()
        if group.size() == 1:
            return placed
        return reduce_from_tensor_model_parallel_region(placed, group=group)


def pack(
    sequences: Sequences, *, packed: bool, sequence_parallel_size: int = 1, qkv_format: str = "sbhd"
) -> PackedLayout:
    """Arrange the samples for this context-parallel rank.

    Args:
        sequences: the samples, on the CPU. On a GPU every length would cost a wait for the device.
        packed: concatenate samples without padding; else pad to the longest.
        sequence_parallel_size: ranks that split positions between attentions; divides P.
        qkv_format: `thd` if TransformerEngine computes attention over packed samples, else `sbhd`.
    """
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    unit = (
        2 * ranks if ranks > 1 else 1
    )  # a context rank has two slices of each sequence, an early (cheap) and a late (expensive) one
    lengths = sequences.lengths if packed else torch.full_like(sequences.lengths, sequences.input_ids.shape[1])
    padded = _up(lengths, unit if packed else unit * sequence_parallel_size)
    positions = [own_positions(int(length), rank, ranks) for length in padded]
    input_ids = sequences.input_ids.new_zeros(len(sequences), int(padded.max()))
    input_ids[:, : sequences.input_ids.shape[1]] = sequences.input_ids
    samples, steps = sequences.response_mask.nonzero(as_tuple=True)
    row, mine = _local(sequences.predicting_positions[samples, steps], padded[samples], rank, ranks)
    samples, steps, row = samples[mine], steps[mine], row[mine]
    tokens, (size, width) = sequences.response_ids[samples, steps], sequences.response_mask.shape
    if not packed:
        return PackedLayout(input_ids[:, positions[0]], None, (row, samples), (samples, steps), tokens, (size, width))
    own = padded // ranks
    starts = own.cumsum(0) - own
    flat = torch.cat([input_ids[sample, index] for sample, index in enumerate(positions)])
    # a segment of padding makes the total divisible
    extra = -len(flat) % (sequence_parallel_size * (2 if ranks > 1 else 1))
    if extra:
        flat, padded = torch.cat([flat, flat.new_zeros(extra)]), torch.cat([padded, padded.new_tensor([extra * ranks])])
        positions.append(own_positions(extra * ranks, rank, ranks))
    rows = (starts[samples] + row, torch.zeros_like(samples))
    found = _packed_samples(padded, positions, ranks, qkv_format)
    return PackedLayout(flat[None], found, rows, (samples, steps), tokens, (size, width))


def _up(lengths: Tensor, unit: int) -> Tensor:
    return (lengths + unit - 1) // unit * unit


def own_positions(length: int, rank: int, ranks: int) -> Tensor:
    """Return the positions of a sequence on a context rank: slices `rank` and `2 * ranks - 1 - rank` of `2 * ranks`."""
    if ranks == 1:
        return torch.arange(length)
    half = length // (2 * ranks)
    return torch.cat([torch.arange(half) + half * piece for piece in (rank, 2 * ranks - 1 - rank)])


def _local(positions: Tensor, lengths: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return (index among the rank's own positions, whether the rank has it) of positions in sequences of `lengths`."""
    if ranks == 1:
        return positions, torch.ones_like(positions, dtype=torch.bool)
    half = lengths // (2 * ranks)
    piece = positions // half
    first, second = piece == rank, piece == 2 * ranks - 1 - rank
    return positions - piece * half + torch.where(second, half, 0), first | second


def _packed_samples(lengths: Tensor, positions: list[Tensor], ranks: int, qkv_format: str) -> PackedSamples:
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    longest = int(lengths.max())
    return PackedSamples(
        qkv_format=qkv_format,
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple((lengths // ranks).tolist()),
        positions=torch.cat(positions),
    )
