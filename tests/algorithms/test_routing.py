from __future__ import annotations

import torch

from roll_gspo.algorithms.routing import expert_difference
from roll_gspo.batch import Sequences
from roll_gspo.metrics import merge, to_floats


def routes(*tokens: list[list[int]]) -> torch.Tensor:
    """[1, S, L, K] int16 of one sample."""
    return torch.tensor([tokens], dtype=torch.int16)


def difference(ours: torch.Tensor, theirs: torch.Tensor, positions: list[bool]) -> float:
    return to_floats({"d": expert_difference(ours, theirs, torch.tensor([positions]))})["d"]


def test_difference_of_a_hand_computed_case() -> None:
    """Three positions that count, two layers, two experts: 3 of 12 differ."""
    ours = routes([[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]])
    theirs = routes([[0, 1], [2, 9]], [[4, 5], [6, 7]], [[8, 9], [1, 3]])
    assert difference(ours, theirs, [True, True, True]) == 3 / 12
    assert difference(ours, theirs, [True, True, False]) == 1 / 8
    assert difference(ours, theirs, [False, True, False]) == 0


def test_difference_ignores_the_order_of_the_experts() -> None:
    ours, theirs = routes([[3, 1, 2]]), routes([[2, 3, 1]])
    assert difference(ours, theirs, [True]) == 0
    assert difference(routes([[0, 1, 2]]), routes([[1, 2, 3]]), [True]) == 1 / 3, "shifted by one is one expert"


def test_difference_is_the_same_from_either_side() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 7, 3, 16, generator=generator).argsort(-1)[..., :4] for _ in range(2))
    positions = torch.rand(2, 7, generator=generator) < 0.6
    one, other = expert_difference(ours, theirs, positions), expert_difference(theirs, ours, positions)
    assert float(one.value) == float(other.value) > 0
    assert float(one.weight) == int(positions.sum()) * 3 * 4
    sets = [[set(row) for row in routes[positions].flatten(0, 1).tolist()] for routes in (ours, theirs)]
    assert float(one.value) == sum(len(a - b) for a, b in zip(*sets, strict=True))


def test_position_that_one_side_did_not_record_never_counts() -> None:
    ours = routes([[0, 1], [2, 3]], [[0, 1], [2, 3]])
    theirs = routes([[0, 9], [-1, -1]], [[-1, -1], [-1, -1]])
    assert difference(ours, theirs, [True, True]) == 1 / 2
    assert difference(theirs, ours, [True, True]) == 1 / 2


def test_difference_of_nothing_is_zero() -> None:
    ours = routes([[0, 1]])
    assert difference(ours, ours, [False]) == 0
    assert difference(torch.full_like(ours, -1), ours, [True]) == 0


def test_differences_of_micro_batches_add_up_to_that_of_the_whole() -> None:
    ours = routes([[0, 1]], [[2, 3]], [[4, 5]]).transpose(0, 1)
    theirs = routes([[0, 2]], [[2, 3]], [[6, 7]]).transpose(0, 1)
    positions = torch.ones(3, 1, dtype=torch.bool)
    parts = [{"d": expert_difference(ours[i], theirs[i], positions[i])} for i in torch.arange(3).split(2)]
    assert to_floats(merge(parts)) == to_floats({"d": expert_difference(ours, theirs, positions)}) == {"d": 3 / 6}


def test_positions_that_count_are_those_that_response_tokens_are_predicted_from() -> None:
    """Prompt 2 and response 3 in a width of 6: positions 1, 2, 3, so neither the last token nor padding."""
    tokens = Sequences(
        torch.zeros(2, 6, dtype=torch.int64),
        torch.tensor([2, 4]),
        torch.tensor([[True, True, True], [False, False, False]]),
    )
    expected = [[False, True, True, True, False, False], [False] * 6]
    assert tokens.predicting_mask.tolist() == expected
    assert int(tokens.predicting_mask.sum()) == int(tokens.response_mask.sum())
