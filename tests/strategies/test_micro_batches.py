"""Micro-batches and their ranks: every sample once, within the budget, with similar costs, the same on every rank."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Checkpoints, sequences
from tiny_models import FAMILIES

from roll_gspo.models.architecture import Architecture
from roll_gspo.models.pass_cost import PassCost
from roll_gspo.strategies.micro_batches import cost_of_pass, costs_of, share_of_rank, split_samples

LONG = PassCost(per_token=3_000, per_pair=1)


def long_tailed(samples: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (500 * torch.exp(torch.randn(samples, generator=generator))).long().clamp(20, 8_000)


def quadratic(lengths: torch.Tensor) -> torch.Tensor:
    return LONG.per_token * lengths + LONG.per_pair * lengths**2


def shares(parts: list[torch.Tensor], ranks: int, costs: list[int] | None = None) -> list[list[int]]:
    """Return the samples of each rank."""
    owned = [share_of_rank(parts, rank, ranks, 1, costs) for rank in range(ranks)]
    assert len({len(mine) for mine in owned}) == 1
    found = [[index for part in mine if part is not None for index in part.tolist()] for mine in owned]
    assert sorted(index for mine in found for index in mine) == list(range(sum(map(len, parts))))
    return found


def imbalance(lengths: torch.Tensor, owned: list[list[int]]) -> float:
    sums = [int(quadratic(lengths[mine]).sum()) for mine in owned]
    return max(sums) * len(sums) / sum(sums)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_every_sample_is_in_one_micro_batch_within_the_budget(ranks: int, packed: bool) -> None:
    lengths = long_tailed()
    parts = split_samples(lengths, 1, 4_096, packed, ranks=ranks, costs=quadratic(lengths))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        tokens = int(lengths[part].sum()) if packed else len(part) * int(lengths[part].max())
        assert tokens <= 4_096 or len(part) == 1
        assert lengths[part].diff().ge(0).all(), "samples are in the order of their lengths"


def test_one_rank_fills_one_micro_batch_after_the_other() -> None:
    lengths = torch.tensor([5, 3, 9, 2, 4])
    assert [part.tolist() for part in split_samples(lengths, 1, 9, packed=True)] == [[3, 1, 4], [0], [2]]
    assert [part.tolist() for part in split_samples(lengths, 1, 9)] == [[3, 1], [4], [0], [2]]
    assert [part.tolist() for part in split_samples(lengths, 2)] == [[3, 1], [4, 0], [2]]


def test_number_of_micro_batches_is_a_multiple_of_the_ranks() -> None:
    lengths = torch.full((30,), 100)
    assert len(split_samples(lengths, 1, 1_000, packed=True)) == 3
    parts = split_samples(lengths, 1, 1_000, packed=True, ranks=4)
    assert sorted(map(len, parts)) == [7, 7, 8, 8]
    assert sorted(map(len, split_samples(lengths, 1, 1_000, ranks=4))) == [6, 8, 8, 8]
    assert len(split_samples(lengths[:3], 1, 1_000, packed=True, ranks=4)) == 3, "there are only three samples"


def test_packed_micro_batches_fall_back_to_the_order_of_lengths_if_they_do_not_fit() -> None:
    lengths = torch.tensor([6, 6, 5, 5, 5, 3])  # two parts of 15: only {6, 6, 3} and {5, 5, 5}
    costs = torch.tensor([6, 6, 5, 5, 5, 3])
    parts = split_samples(lengths, 1, 15, packed=True, ranks=2, costs=costs)
    assert all(int(lengths[part].sum()) <= 15 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(6))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_similar_costs(ranks: int) -> None:
    lengths = long_tailed(256)
    costs = quadratic(lengths)
    in_turn = list(lengths.argsort(stable=True).split(1))
    balanced = shares(in_turn, ranks, [int(costs[part].sum()) for part in in_turn])
    assert imbalance(lengths, balanced) < 1.02 < imbalance(lengths, shares(in_turn, ranks))
    packed = split_samples(lengths, 1, 16_384, packed=True, ranks=ranks, costs=costs)
    assert len(packed) % ranks == 0
    assert imbalance(lengths, shares(packed, ranks, [int(costs[part].sum()) for part in packed])) < 1.02


def test_shares_without_costs_take_turns_and_keep_the_order() -> None:
    assert share_of_rank("abcde", 0, 2) == ["a", "c", "e"]
    assert share_of_rank("abcde", 1, 2) == ["b", "d", None]
    assert share_of_rank("abcde", 1, 2, multiple_of=2) == ["b", "d", None, None]
    assert share_of_rank("abcde", 0, 1) == list("abcde")
    assert share_of_rank("abcd", 0, 2, costs=[1, 1, 1, 9]) == ["c", "d"], "no rank has more passes than needed"


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_counts_the_weights_that_a_token_meets(checkpoint: Checkpoints, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family)
    model = Architecture.from_checkpoint(folder)
    weights = 0
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        if ".layers." not in name or tensor.dim() < 2:
            continue
        share = 1 if model.experts is None or tensor.dim() < 3 else model.experts.num_experts_per_token / len(tensor)
        weights += tensor.numel() * share
    cost = PassCost.of(model)
    assert cost.per_token == 2 * weights
    assert cost.per_pair == 2 * model.num_layers * model.num_attention_heads * model.head_dim
    assert cost.per_prediction == 2 * model.hidden_size * model.vocab_size


def test_windows_limit_the_pairs_of_a_token() -> None:
    tokens, lengths = sequences(), sequences().lengths
    pairs = [sum(min(position + 1, 6) for position in range(length)) for length in lengths.tolist()]
    found = costs_of(tokens, PassCost(0, 0, 0, per_windowed_pair=1, window=6))
    # Half of the square of n counts n / 2 pairs less than there are.
    want = [2 * count - min(length, 6) for count, length in zip(pairs, lengths.tolist(), strict=True)]
    assert found.tolist() == want
    assert costs_of(tokens, PassCost(0, 0, 0, per_windowed_pair=1, window=100)).tolist() == (lengths**2).tolist()


def test_padding_costs_if_samples_are_not_packed() -> None:
    tokens, cost = sequences(), PassCost(100, 10, 1)
    lengths, predicted = tokens.lengths, tokens.response_mask.sum(-1)
    want = 100 * lengths + 10 * lengths**2 + predicted
    assert costs_of(tokens, cost).tolist() == want.tolist()
    assert cost_of_pass(tokens, cost, packed=True) == int(want.sum())
    index = torch.tensor([0, 1])
    widest = int(lengths[index].max())
    padded = 2 * (100 * widest + 10 * widest**2) + int(predicted[index].sum())
    assert cost_of_pass(tokens, cost, False, index) == cost_of_pass(tokens.rows(index), cost, False) == padded
