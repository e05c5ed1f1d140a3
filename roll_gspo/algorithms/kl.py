"""KL estimators per token (`kl_penalty`, `kl_loss_type`) and the controllers of the KL coefficient.

Source of k1..k3: J. Schulman, "Approximating KL Divergence" (2020). `d = log_probs - ref_log_probs` of tokens
that the policy of `log_probs` sampled; k1 and k3 are unbiased estimates of KL(policy || reference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from roll_gspo.algorithms.masking import masked_difference

MAX_K3 = 10.0
MAX_LOG_DIFFERENCE = 20.0  # k3 is above MAX_K3 here; keeps exp and its gradient finite
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
    """Return the estimate [B, T] per token, exactly 0 where masked; `kl_type` is a name in `KL_ESTIMATORS`."""
    return KL_ESTIMATORS[kl_type](masked_difference(log_probs, ref_log_probs, response_mask))


class KLController(Protocol):
    """Interface of the controllers of the token-level KL coefficient."""

    @property
    def kl_coef(self) -> float:
        """The current coefficient."""
        ...

    def update(self, kl: float, num_samples: int) -> None:
        """Adapt the coefficient to the mean KL per token of a step with `num_samples` samples."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of `state_dict`."""
        ...


class FixedKLController:
    """Keeps `init_kl_coef` for the whole run."""

    def __init__(self, init_kl_coef: float) -> None:
        self.kl_coef = init_kl_coef

    def update(self, kl: float, num_samples: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient, for information."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Keep the configured coefficient: a resumed run may have changed it on purpose."""


class AdaptiveKLController:
    """Adapts the coefficient so that the KL approaches `target_kl` (arXiv 1909.08593).

    `kl_coef *= 1 + clip(kl / target_kl - 1, +-0.2) * num_samples / kl_horizon`
    """

    def __init__(self, init_kl_coef: float, target_kl: float, kl_horizon: int) -> None:
        self.kl_coef = init_kl_coef
        self.target_kl = target_kl
        self.kl_horizon = kl_horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Adapt the coefficient to the mean KL per token of a step with `num_samples` samples."""
        error = min(max(kl / self.target_kl - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.kl_coef *= 1.0 + error * num_samples / self.kl_horizon

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the coefficient."""
        self.kl_coef = state["kl_coef"]


def kl_controller(init_kl_coef: float, target_kl: float | None, kl_horizon: int) -> KLController:
    """Return an adaptive controller if there is a `target_kl`, else a fixed one."""
    if target_kl is None:
        return FixedKLController(init_kl_coef)
    return AdaptiveKLController(init_kl_coef, target_kl, kl_horizon)
