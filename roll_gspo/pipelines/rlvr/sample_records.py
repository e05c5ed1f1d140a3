"""Samples as records of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.rewards.base import RewardResult
from roll_gspo.tracking.rollouts import RolloutRecord, TokenValues, compact
from roll_gspo.tracking.token_texts import TokenTexts


def rollout_records(
    rollouts: Rollouts,
    domains: Sequence[str],
    results: Sequence[RewardResult],
    decode: Callable[[Sequence[int]], str],
    trained: TrainBatch | None = None,
    first_group: int = 0,
) -> Iterator[RolloutRecord]:
    """Yield the record of every sample.

    Args:
        rollouts, domains, results: the samples, and the reward block and the result of each.
        decode: converts token ids to text.
        trained: the training batch that was built from them; None in validation.
        first_group: index of the first group, if a file receives several batches.
    """
    mask = rollouts.sequences.response_mask
    token_texts = TokenTexts(decode)
    for row, (prompt, completion) in enumerate(zip(rollouts.prompts, rollouts.completions, strict=True)):
        result = results[row]
        yield RolloutRecord(
            prompt=prompt.text,
            response=decode(completion.token_ids),
            score=result.score,
            failed=result.failed is not None,
            advantage=math.nan if trained is None else float(trained.advantages[row].sum() / mask[row].sum().clamp(1)),
            ground_truth=prompt.row["ground_truth"],
            domain=domains[row],
            group=first_group + int(rollouts.group_ids[row]),
            finish_reason=completion.finish_reason,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=completion.token_ids,
            weights_version=rollouts.weights_version,
            failure=result.failed,
            answer=result.answer,
            components=result.components,
            response_tokens=token_texts(completion.token_ids),
            rollout_log_probs=response_values(rollouts.rollout_log_probs, mask, row),
            old_log_probs=() if trained is None else response_values(trained.old_log_probs, mask, row),
            advantages=() if trained is None else response_values(trained.advantages, mask, row),
        )


def response_values(values: Tensor, mask: Tensor, row: int) -> TokenValues:
    """Return the values of one sample's response tokens; `values` and `mask` are [B, T]."""
    return compact(values[row][mask[row]].tolist())
