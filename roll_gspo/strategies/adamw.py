"""AdamW of the engines on transformers models: its groups of parameters, and a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter

from roll_gspo.strategies.base import OptimizerSetup


def make_adamw(parameters: Sequence[Parameter], setup: OptimizerSetup) -> torch.optim.AdamW:
    """Build AdamW with decoupled weight decay, none on biases and norms.

    Args:
        parameters: the trained parameters, whole or sharded.
        setup: settings of the optimizer.
    """
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": setup.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=setup.learning_rate, betas=setup.betas, eps=setup.epsilon)


def step_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take a step with a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
