"""Discounted sums over the valid tokens of a response: reward-to-go and generalised advantage estimation.

Legend: B samples, T response positions. Only valid tokens discount; gaps of the mask are skipped.
There is no loop over samples or tokens: `y_t = x_t + g y_t+1` is a matrix product within blocks of `BLOCK` tokens, and
the same recurrence with `g^BLOCK` over the blocks. All powers of g are in [0, 1], and no step divides by one of them or
subtracts large sums. Float32 is therefore accurate for any length and any g in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from roll_gspo.algorithms.masking import zero_masked

BLOCK = 16


def discounted_returns(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Return the reward-to-go `G_t = r_t + gamma G_t+1` [B, T], anything where masked.

    Args:
        rewards: [B, T] of each token, 0 where masked (see `token_rewards`).
        response_mask: [B, T] bool.
        gamma: discount per valid token, in [0, 1].
    """
    # Without a discount a gap is only a zero in the sum.
    order = None if gamma == 1.0 else token_order(response_mask)
    return _spread(_discounted_sum(_compact(rewards, order), gamma), order)


def generalised_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lambd: float
) -> Tensor:
    """Return the advantages [B, T] of GAE, anything where masked (arXiv 1506.02438, eq. 16).

    `A_t = sum_l (gamma lambd)^l delta_t+l` with `delta_t = r_t + gamma V_t+1 - V_t`. V is 0 after the last valid token,
    since the response has ended.

    Args:
        rewards: [B, T] of each token, 0 where masked (see `token_rewards`).
        values: [B, T] expected return before each token, anything where masked.
        response_mask: [B, T] bool.
        gamma, lambd: in [0, 1].
    """
    order = token_order(response_mask)
    values = _compact(zero_masked(values, response_mask), order)
    residuals = _compact(rewards, order).add(pad(values[:, 1:], (0, 1)), alpha=gamma).sub_(values)
    return _spread(_discounted_sum(residuals, gamma * lambd), order)


def token_order(response_mask: Tensor) -> Tensor | None:
    """Return [B, T] int64: the index, among the valid tokens of its row, of each position's latest valid token.

    Positions before the first valid token get 0. Return None if the valid tokens of every row come first, since the
    index then equals the position.
    """
    starts = response_mask[:, 1:] > response_mask[:, :-1]
    if not starts.numel() or not int(starts.view(torch.uint8).amax()):  # amax of bytes is much faster than any
        return None
    return response_mask.cumsum(-1).sub_(1).clamp_(min=0)


def _compact(values: Tensor, order: Tensor | None) -> Tensor:
    """Move the valid tokens of each row to its left end; `values` [B, T] must be 0 where masked."""
    return values if order is None else torch.zeros_like(values).scatter_add_(1, order, values)


def _spread(values: Tensor, order: Tensor | None) -> Tensor:
    """Undo `_compact`; masked positions may hold anything."""
    return values if order is None else values.gather(1, order)


def _discounted_sum(x: Tensor, discount: float) -> Tensor:
    """Return `y_t = x_t + discount y_t+1` along the last dimension of [B, T]."""
    if discount == 1.0:
        return x.flip(-1).cumsum(-1).flip(-1)
    width = x.shape[-1]
    if width <= BLOCK:
        return x @ _powers(width, discount, x)
    blocks = pad(x, (0, -width % BLOCK)).view(len(x), -1, BLOCK)
    within = blocks @ _powers(BLOCK, discount, x)
    # The sum over the tokens after a block enters its j-th token with the factor discount^(BLOCK - j).
    starts = _discounted_sum(within[:, :, 0], discount**BLOCK)
    following = pad(starts[:, 1:], (0, 1))
    reach = _decay(BLOCK, discount, x).flip(0) * discount
    return within.addcmul_(following[:, :, None], reach).view(len(x), -1)[:, :width]


def _decay(width: int, discount: float, like: Tensor) -> Tensor:
    """Return `discount^0 .. discount^(width - 1)` in the dtype of `like`; subnormals, which are slow, become 0."""
    exponents = torch.arange(width, dtype=torch.float64, device=like.device)
    powers = torch.pow(discount, exponents)
    return torch.where(powers < torch.finfo(like.dtype).tiny, 0.0, powers).to(like.dtype)


def _powers(width: int, discount: float, like: Tensor) -> Tensor:
    """Return [width, width] with `discount^(k - t)` at [k, t] for k >= t, else 0."""
    index = torch.arange(width, device=like.device)
    lag = index[:, None] - index
    decay = _decay(width, discount, like)
    return torch.where(lag >= 0, decay[lag.clamp(min=0)], torch.zeros_like(decay))
