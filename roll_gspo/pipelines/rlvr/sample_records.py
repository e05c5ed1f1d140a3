"""Convert scored samples to the columns of a file, and choose the samples that are written with texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.rewards.base import RewardResult
from roll_gspo.tracking.rollouts import SampleBatch, TokenLists
from roll_gspo.tracking.samples import Sample, spread
from roll_gspo.tracking.token_texts import TokenTexts

_FAILED_SHARE = 4  # at most a quarter of the samples with texts are chosen because a reward failed


def sample_batch(
    rollouts: Rollouts,
    domains: Sequence[str],
    results: Sequence[RewardResult],
    texts: TokenTexts,
    with_text: Sequence[int],
    trained: TrainBatch | None = None,
    first: int = 0,
    first_group: int = 0,
    version: int | None = None,
) -> SampleBatch:
    """Return all samples as columns, with the tokens of the own conversation of an episode.

    Args:
        rollouts, domains, results: the samples, and the reward block and the result of each.
        texts: converts token ids to text.
        with_text: rows of the samples whose texts are written.
        trained: the training batch that was built from them; None in validation.
        first, first_group: index of the first sample and the first group, if a file receives several batches.
        version: version of the trainer's weights before the update; None in validation.
    """
    sequences, count = rollouts.own, len(rollouts)
    mask = sequences.response_mask
    positions = torch.arange(sequences.input_ids.shape[1])
    is_prompt = positions < sequences.prompt_lengths[:, None]
    is_response = sequences.attention_mask & ~is_prompt
    token_lists = {
        "prompt_token_ids": token_lists_of(sequences.input_ids, is_prompt),
        "response_token_ids": token_lists_of(sequences.input_ids, is_response),
        "rollout_log_probs": token_lists_of(rollouts.rollout_log_probs[:count], mask),
    }
    episodes = [completion.episode for completion in rollouts.completions]
    has_episodes = any(episode is not None for episode in episodes)
    if has_episodes:
        in_response = torch.arange(mask.shape[1]) < sequences.response_lengths[:, None]
        token_lists["response_mask"] = token_lists_of(mask, in_response)
    columns = {"response_length": mask.sum(-1).tolist()} | _columns(rollouts, domains, results, first, first_group)
    columns |= version_columns(rollouts, version)
    if trained is not None:
        token_lists["old_log_probs"] = token_lists_of(trained.old_log_probs[:count], mask)
        token_lists["advantages"] = token_lists_of(trained.advantages[:count], mask)
        columns["advantage"] = (trained.advantages[:count].sum(-1) / mask.sum(-1).clamp(1)).tolist()
    return SampleBatch(
        columns,
        [prompt.text for prompt in rollouts.prompts],
        [prompt.row.get("ground_truth") for prompt in rollouts.prompts],
        token_lists,
        with_text,
        texts,
        episodes if has_episodes else (),
    )


def _columns(
    rollouts: Rollouts, domains: Sequence[str], results: Sequence[RewardResult], first: int, first_group: int
) -> dict[str, Sequence[Any]]:
    rows = [prompt.row for prompt in rollouts.prompts]
    return {
        "sample": range(first, first + len(rollouts)),
        "id": [row.get("id") for row in rows],
        "source": [row.get("source") for row in rows],
        "domain": domains,
        "group": (rollouts.group_ids + first_group).tolist(),
        "score": [None if result.failed is not None else result.score for result in results],
        "failed": [result.failed is not None for result in results],
        "failure": [result.failed for result in results],
        "answer": [result.answer for result in results],
        "components": [_entries(result.components) for result in results],
        "finish_reason": [completion.finish_reason for completion in rollouts.completions],
    }


def version_columns(rollouts: Rollouts, version: int | None) -> dict[str, Sequence[Any]]:
    """Return the oldest version of each sample, its runs of versions, and its staleness by its oldest token."""
    runs = [completion.runs(rollouts.weights_version) for completion in rollouts.completions]
    oldest = [min(version for version, _ in of_sample) for of_sample in runs]
    return {
        "weights_version": oldest,
        "version_runs": [[{"version": v, "tokens": n} for v, n in of_sample] for of_sample in runs],
        "staleness": [None if version is None else version - one for one in oldest],
    }


def _entries(components: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value if math.isfinite(value) else None} for name, value in components.items()]


def token_lists_of(values: Tensor, mask: Tensor) -> TokenLists:
    """Return the values [B, W] at the true positions of `mask` [B, W], as one list per sample."""
    offsets = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    chosen = values[mask]
    if chosen.dtype != torch.bool:
        chosen = chosen.to(torch.float32 if chosen.is_floating_point() else torch.int32)
    return TokenLists(chosen.numpy(), offsets.numpy())


def rows_with_text(
    rollouts: Rollouts, results: Sequence[RewardResult], limit: int | None, traced: Sequence[int] = ()
) -> list[int]:
    """Return the rows of the samples whose texts are written, at most `limit`.

    Traced samples come first, then groups with a failed reward, then the groups in the order of the batch.
    """
    groups = rollouts.group_ids.tolist()
    failing = {group for group, result in zip(groups, results, strict=True) if result.failed is not None}
    failed = [row for row, group in enumerate(groups) if group in failing]
    quota = None if limit is None else limit // _FAILED_SHARE
    return list(dict.fromkeys((*traced, *failed[:quota], *range(len(rollouts)))))[:limit]


def tracked_samples(
    rollouts: Rollouts,
    domains: Sequence[str],
    results: Sequence[RewardResult],
    advantages: Tensor,
    texts: TokenTexts,
) -> list[Sample]:
    """Return a few samples for trackers, from the lowest score to the highest. `advantages` are [B, T]."""
    chosen = []
    for row in spread({row: result.score for row, result in enumerate(results) if result.failed is None}):
        prompt, completion, result = rollouts.prompts[row], rollouts.completions[row], results[row]
        episode = completion.episode
        num_tokens = len(completion.token_ids) if episode is None else sum(episode.mask)
        chosen.append(
            Sample(
                score=result.score,
                advantage=float(advantages[row].sum()) / max(num_tokens, 1),
                num_tokens=num_tokens,
                finish_reason=completion.finish_reason if episode is None else episode.end,
                domain=domains[row],
                ground_truth=prompt.row.get("ground_truth"),
                answer=result.answer,
                prompt=prompt.text,
                response=texts.decode(completion.token_ids),
            )
        )
    return chosen


def traced_samples(rollouts: Rollouts, results: Sequence[RewardResult], num_groups: int) -> Tensor:
    """Return the rows of the first `num_groups` groups, those with different scores before the others."""
    scores: dict[int, set[float]] = {}
    for group, result in zip(rollouts.group_ids.tolist(), results, strict=True):
        scores.setdefault(group, set()).add(result.score)
    chosen = sorted(scores, key=lambda group: len(scores[group]) == 1)[:num_groups]
    return torch.isin(rollouts.group_ids, torch.tensor(chosen, dtype=rollouts.group_ids.dtype)).nonzero().flatten()
