"""Supervised warm start of a tiny model, so that reinforcement learning starts with some successes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Demonstration:
    """A templated prompt and the answers to imitate, including the end-of-sequence tokens.

    Attributes:
        prompt_ids: tokens of the prompt.
        answer_ids: tokens after the prompt.
        mask: for each of `answer_ids`, True if it is imitated; empty if all are.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    mask: tuple[bool, ...] = ()


def train(
    model: Any,
    demonstrations: Sequence[Demonstration],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    pad: int,
    progress: Callable[[int, int], None],
) -> float:
    """Train `model` in place with AdamW, linear warm-up and cosine decay.

    Returns:
        The loss of the last step, in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    order = random.Random(seed)
    model.train()
    loss_value = math.nan
    for step in range(steps):
        batch = order.choices(demonstrations, k=batch_size)
        input_ids, labels = _pad(batch, pad)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss_value = float(loss.detach())
        progress(step + 1, steps)
    model.eval()
    return loss_value


def _learning_rate_factor(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def _pad(batch: Sequence[Demonstration], pad: int) -> tuple[Tensor, Tensor]:
    """Return [B, S] tokens and [B, S] labels, padded on the right; causal attention needs no mask for it."""
    width = max(len(d.prompt_ids) + len(d.answer_ids) for d in batch)
    input_ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED_LABEL)
    for row, d in enumerate(batch):
        start, end = len(d.prompt_ids), len(d.prompt_ids) + len(d.answer_ids)
        input_ids[row, :start] = torch.tensor(d.prompt_ids)
        input_ids[row, start:end] = labels[row, start:end] = torch.tensor(d.answer_ids)
        if d.mask:
            labels[row, start:end][~torch.tensor(d.mask)] = IGNORED_LABEL
    return input_ids, labels
