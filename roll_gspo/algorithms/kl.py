"""KL estimators per token (`kl_penalty`, `kl_loss_type`) and the controllers of the KL coefficient.

Source of k1..k3: J. Schulman, "Approximating KL Divergence" (2020). `d = log_probs - ref_log_probs` of tokens
that the policy of `log_probs` sampled; k1 and k3 are unbiased estimates of KL(policy || reference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.masking import masked_difference

MAX_K3 = 10.0
MAX_LOG_DIFFERENCE = 20.0  # k3 is beyond MAX_K3 there; keeps exp, and with it the gradient, finite
MAX_RELATIVE_ERROR = 0.2


def k1(difference: Tensor) -> Tensor:
    """`d`: unbiased, may be negative."""
    return difference


def absolute(difference: Tensor) -> Tensor:
    """`|d|`."""
    return difference.abs()


def mse(difference: Tensor) -> Tensor:
    """`d^2 / 2` (k2)."""
    return 0.5 * difference.square()


def k3(difference: Tensor) -> Tensor:
    """`exp(-d) - 1 + d`, clamped to +-10: unbiased and never negative."""
    bounded = difference.clamp(-MAX_LOG_DIFFERENCE, MAX_LOG_DIFFERENCE)
    return ((-bounded).expm1() + bounded).clamp(-MAX_K3, MAX_K3)


KL_ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"kl": k1, "abs": absolute, "mse": mse, "k3": k3}


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor, kl_type: str) -> Tensor:
    """The estimate [B, T] of each token, exactly 0 where masked.

    Raises:
        ValueError: `kl_type` is not in `KL_ESTIMATORS`.
    """
    estimator = choose(KL_ESTIMATORS, "kl estimator", kl_type)
    return estimator(masked_difference(log_probs, ref_log_probs, response_mask))


class KLController(Protocol):
    """Holds the coefficient of the token-level KL penalty."""

    @property
    def kl_coef(self) -> float:
        """The coefficient to use now."""
        ...

    def update(self, kl: float, num_samples: int) -> None:
        """Tell the KL per token that a step of `num_samples` samples measured."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave."""
        ...


class FixedKLController:
    """`init_kl_coef` for the whole run."""

    def __init__(self, init_kl_coef: float) -> None:
        self.kl_coef = init_kl_coef

    def update(self, kl: float, num_samples: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient, for the record."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Keeps the configured coefficient: a resumed run may have changed it on purpose."""


class AdaptiveKLController:
    """Moves the coefficient so that the KL approaches `target_kl` (arXiv 1909.08593).

    `kl_coef *= 1 + clip(kl / target_kl - 1, +-0.2) * num_samples / kl_horizon`
    """

    def __init__(self, init_kl_coef: float, target_kl: float, kl_horizon: int) -> None:
        if target_kl <= 0 or kl_horizon <= 0:
            raise ValueError(f"target_kl {target_kl}, kl_horizon {kl_horizon}: must be positive; raise them")
        self.kl_coef = init_kl_coef
        self.target_kl = target_kl
        self.kl_horizon = kl_horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Move the coefficient after a step of `num_samples` samples with a mean KL per token of `kl`."""
        error = min(max(kl / self.target_kl - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.kl_coef *= 1.0 + error * num_samples / self.kl_horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.kl_coef = state["kl_coef"]


def kl_controller(init_kl_coef: float, target_kl: float | None, kl_horizon: int) -> KLController:
    """Adaptive where there is a `target_kl`, else fixed."""
    if target_kl is None:
        return FixedKLController(init_kl_coef)
    return AdaptiveKLController(init_kl_coef, target_kl, kl_horizon)
