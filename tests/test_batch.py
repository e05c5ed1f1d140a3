from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roll_gspo.batch import Completion, Prompt, Rollouts, Sequences, TrainBatch, moved, pad_rows
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.log_probs import score_in_micro_batches

PAD = 0


def sequences() -> Sequences:
    return Sequences.collate([[1, 2], [3], [4, 5, 6]], [[7, 8], [], [9, 10, 11]], PAD)


def test_collate_puts_responses_behind_prompts_and_pads_on_the_right() -> None:
    s = sequences()
    assert s.input_ids.tolist() == [[1, 2, 7, 8, 0, 0], [3, 0, 0, 0, 0, 0], [4, 5, 6, 9, 10, 11]]
    assert s.response_mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert s.lengths.tolist() == [4, 1, 6]
    assert s.attention_mask.sum(-1).tolist() == [4, 1, 6]


def test_predicting_position_is_the_one_before_the_token() -> None:
    s = sequences()
    assert s.predicting_positions.tolist() == [[1, 2, 0], [0, 0, 0], [2, 3, 4]]
    assert s.response_ids[s.response_mask].tolist() == [7, 8, 9, 10, 11]


def test_padding_token_in_a_response_is_kept() -> None:
    """End-of-sequence and padding may share one id, so the mask comes from lengths, not from values."""
    s = Sequences.collate([[1]], [[5, PAD]], PAD)
    assert s.response_mask.tolist() == [[True, True]]
    assert s.response_ids.tolist() == [[5, PAD]]


def test_rows_are_trimmed_to_their_maximum_widths() -> None:
    part = sequences().rows(torch.tensor([0, 1]))
    assert part.input_ids.tolist() == [[1, 2, 7, 8], [3, 0, 0, 0]]
    assert part.response_mask.shape == (2, 2)


@pytest.mark.parametrize(
    ("prompt_lengths", "mask_rows", "message"),
    [([2], 2, "disagree about B"), ([2, 5], 2, "longer than input_ids is wide")],
)
def test_inconsistent_sequences_are_rejected(prompt_lengths: list[int], mask_rows: int, message: str) -> None:
    mask = torch.ones(mask_rows, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        Sequences(torch.zeros(2, 4, dtype=torch.int64), torch.tensor(prompt_lengths), mask)


def test_rollouts_keep_groups_prompts_and_log_probs_together() -> None:
    prompts = [Prompt((1, 2), "a", {}), Prompt((3,), "b", {})]
    groups = [
        [Completion((7,), (-0.5,), "stop"), Completion((8, 9), (-1.0, -2.0), "length")],
        [Completion((4,), (-0.25,), "stop")],
    ]
    rollouts = Rollouts.collate(prompts, groups, PAD, weights_version=3)
    assert rollouts.group_ids.tolist() == [0, 0, 1]
    assert [p.text for p in rollouts.prompts] == ["a", "a", "b"]
    assert rollouts.rollout_log_probs.tolist() == [[-0.5, 0.0], [-1.0, -2.0], [-0.25, 0.0]]
    assert rollouts.weights_version == 3 and len(rollouts) == 3
    assert rollouts.versions.tolist() == [[3, 3]] * 3


def test_rollouts_know_the_version_of_every_token() -> None:
    runs = Completion((7, 8, 9), (-0.5,) * 3, "stop", version_runs=((4, 2), (6, 1)))
    plain = Completion((5,), (-1.0,), "stop")
    rollouts = Rollouts.collate([Prompt((1,), "a", {})], [[runs, plain]], PAD, weights_version=5)
    assert rollouts.versions[0].tolist() == [4, 4, 6] and rollouts.versions[1, 0] == 5
    assert rollouts.versions.dtype == torch.int32 and rollouts.weights_version == 6
    old = Completion((7,), (-0.5,), "stop", version_runs=((2, 1),))
    recorded = Rollouts.collate([Prompt((1,), "a", {})], [[old]], PAD, weights_version=5)
    assert recorded.weights_version == 2, "what the engine records counts, not the current version"


def train_batch(with_reference: bool) -> TrainBatch:
    s = sequences()
    values = torch.arange(9.0).reshape(3, 3)
    reference = -values if with_reference else None
    return TrainBatch(s, torch.arange(3), values, values + 10, values + 20, reference)


@pytest.mark.parametrize("with_reference", [True, False])
def test_split_gives_every_sample_once_with_its_own_values(with_reference: bool) -> None:
    batch = train_batch(with_reference)
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.cat([part.sample_ids for part in parts]).tolist() == [0, 1, 2]
    assert parts[0].advantages.tolist() == [[0.0, 1.0], [3.0, 4.0]]
    assert (parts[1].ref_log_probs is not None) is with_reference
    together = pad_rows([part.old_log_probs for part in parts], 3)
    mask = batch.response_mask
    assert torch.equal(together[mask], batch.old_log_probs[mask])


class WrittenElements(TorchDispatchMode):
    """Count the elements that operators write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func._schema.returns[0].alias_info is None:
            self.count += result.numel()
        return result


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("scoring", [True, False])
def test_splitting_twice_the_samples_is_twice_the_work(scoring: bool, size: int) -> None:
    def work(num_samples: int) -> int:
        s = Sequences.collate([[1]] * num_samples, [[5] * 99] * num_samples, PAD)
        values = torch.zeros(s.response_mask.shape)
        batch = TrainBatch(s, torch.arange(num_samples), values, values, values)
        with WrittenElements() as written:
            if scoring:
                score_in_micro_batches(s, size, lambda part: TokenScores(torch.zeros(part.response_mask.shape), None))
            else:
                batch.split(size)
        return written.count

    assert work(128) / work(64) == pytest.approx(2, rel=0.02)


def test_batch_moves_as_a_whole() -> None:
    batch = train_batch(with_reference=True)
    moved = batch.to("cpu")
    assert torch.equal(moved.sequences.input_ids, batch.sequences.input_ids)
    assert torch.equal(moved.rollout_log_probs, batch.rollout_log_probs)
    assert moved.ref_log_probs is not None and batch.ref_log_probs is not None
    assert torch.equal(moved.ref_log_probs, batch.ref_log_probs)


def test_moved_makes_one_copy_per_dtype() -> None:
    tensors = [torch.arange(6).view(2, 3), torch.ones(()).expand(2, 2), torch.tensor([True]), torch.tensor(3)]
    assert all(a is b for a, b in zip(moved(tensors, "cpu"), tensors, strict=True))
    there = moved(tensors, "meta")
    assert [(t.shape, t.dtype, t.device.type) for t in there] == [(t.shape, t.dtype, "meta") for t in tensors]
    assert there[0]._base is there[3]._base is not there[1]._base
