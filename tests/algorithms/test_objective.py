import pytest
import torch

from roll_gspo.algorithms.objective import clipped_objective, dual_clip


def test_clipped_objective_hand_computed():
    # inside; above, A > 0 (clipped); above, A < 0 (kept); below, A > 0 (kept); below, A < 0 (clipped)
    ratio = torch.tensor([[1.1, 1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    loss, clipped = clipped_objective(ratio, advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[-2.2, -2.6, 3.0, -1.0, 1.6]]))
    assert clipped.tolist() == [[False, True, False, False, True]]


def test_clipped_objective_clipped_is_where_the_gradient_is_zero():
    ratio = torch.linspace(0.5, 1.6, 23)[None].repeat(2, 1).requires_grad_()
    advantages = torch.tensor([[1.5], [-0.5]]).expand(2, 23)
    loss, clipped = clipped_objective(ratio, advantages, 0.2, 0.27)
    loss.sum().backward()
    assert torch.equal(ratio.grad == 0, clipped)
    torch.testing.assert_close(ratio.grad[~clipped], -advantages[~clipped])


def test_clipped_objective_zero_advantage_is_never_clipped():
    loss, clipped = clipped_objective(torch.tensor([[0.1, 9.0]]), torch.zeros(1, 2), 0.2, 0.2)
    assert not bool(clipped.any())
    assert float(loss.abs().sum()) == 0


def test_clipped_objective_gspo_range_fires_where_the_token_range_does_not():
    ratio, advantages = torch.tensor([[1.0005, 0.9995]]), torch.tensor([[1.0, -1.0]])
    assert clipped_objective(ratio, advantages, 3e-4, 4e-4)[1].tolist() == [[True, True]]
    assert clipped_objective(ratio, advantages, 0.2, 0.27)[1].tolist() == [[False, False]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "bounded"),
    [(2.0, -3.0, 4.2, True), (1.3, -3.0, 3.9, False), (2.0, 3.0, -3.6, False)],
)
def test_dual_clip_bounds_only_negative_advantages(ratio, advantage, expected, bounded):
    rho = torch.tensor([[ratio]], requires_grad=True)
    advantages = torch.tensor([[advantage]])
    loss, _ = clipped_objective(rho, advantages, 0.2, 0.2)
    loss, where = dual_clip(loss, advantages, 1.4)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert bool(where) is bounded
    if bounded:
        assert float(rho.grad) == 0
