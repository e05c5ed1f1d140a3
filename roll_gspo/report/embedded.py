"""Choose, shorten and compress the samples that the page holds for its browser."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from roll_gspo.report.episodes import episode_entry, is_episode, response_mask, spread_values
from roll_gspo.report.run_folder import Rollout, read_rollout
from roll_gspo.rollout_files import RolloutFile, Sample, read_columns

MAX_BYTES, MAX_VALIDATION_BYTES = 3 * 2**19, 2**19  # of the page
MAX_READ = 64 * 2**20  # of rollouts/, all files together
MAX_STEPS = 256  # opening a file takes milliseconds
MAX_CHARACTERS = 20_000
MAX_TOKENS = 3000
MAX_SAMPLES = 16  # of a group
_GZIP = 31  # zlib's number for a gzip header and the largest window


@dataclass(frozen=True)
class StepValues:
    """Values of all samples of a step.

    Attributes:
        step: of the samples.
        scores: of the samples whose reward succeeded.
        lengths: tokens per response.
    """

    step: int
    scores: list[float]
    lengths: list[float]


@dataclass(frozen=True)
class EmbeddedSamples:
    """The samples that the page holds.

    Attributes:
        steps: (step, data) in order; data is base64 of gzip of one JSON object per line and group.
        num_samples: number of samples in `steps`.
        num_read: number of samples that were read from files of these steps.
        num_steps_left_out: number of steps in rollouts/ that the page does not hold.
        read_all: every file of these steps was read to its end.
        values: scores and lengths of these steps, in order.
    """

    steps: list[tuple[int, str]]
    num_samples: int
    num_read: int
    num_steps_left_out: int
    read_all: bool
    values: list[StepValues]


def embed_samples(
    files: Sequence[RolloutFile], max_bytes: int = MAX_BYTES, max_read: int = MAX_READ, ranked: bool = True
) -> EmbeddedSamples:
    """Choose the groups that fit into `max_bytes`, which the steps share; at least one group per step.

    The first and the last step are read first, then steps between them. If `ranked`, groups of a step that were scored
    again after the update come first, then those with a failed reward, then those whose scores differ.

    Args:
        files: of all steps, in order.
        max_bytes: of the result; the last group may exceed it.
        max_read: stop when this many bytes have been read.
        ranked: choose groups by their rank; else the first ones, which shows the same prompts in each validation.
    """
    steps: list[tuple[int, str]] = []
    num_samples = num_read = num_files_read = 0
    read_all = True
    values = []
    for index in islice(bisection_order(len(files)), MAX_STEPS):
        if max_bytes <= 0 or max_read <= 0:
            break
        rollout = read_rollout(files[index])
        max_read -= rollout.num_bytes
        share = max_bytes / (min(len(files), MAX_STEPS) - num_files_read)
        num_files_read += 1
        if not rollout.samples:
            continue
        groups = _ranked_groups(rollout.samples) if ranked else group_samples(rollout.samples)
        text, count = _compress(rollout.step, groups, share)
        values.append(_values(files[index], rollout))
        max_bytes -= len(text)
        steps.append((rollout.step, text))
        num_samples += count
        num_read += len(rollout.samples)
        read_all &= rollout.is_complete
    values.sort(key=lambda one: one.step)
    return EmbeddedSamples(sorted(steps), num_samples, num_read, len(files) - len(steps), read_all, values)


def bisection_order(count: int) -> Iterator[int]:
    """Yield 0 to `count` - 1: the first, the last, the middle, the middles of the halves, and so on."""
    yield from range(min(count, 1))
    yield from range(max(count - 1, 1), count)
    gaps = [(0, count - 1)]
    for low, high in gaps:  # grows during the loop
        middle = (low + high) // 2
        if low < middle < high:
            yield middle
            gaps += [(low, middle), (middle, high)]


def group_samples(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples by group, in the order of each group's first sample."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("group")), []).append(sample)
    return list(groups.values())


def best_to_worst(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return at most `count` samples of a group, evenly from the best score to the worst."""
    ranked = sorted(samples, key=lambda s: -(-math.inf if (score := finite_number(s, "score")) is None else score))
    last, shown = len(ranked) - 1, min(count, len(ranked))
    return [ranked[round(i * last / max(shown - 1, 1))] for i in range(shown)]


def finite_number(sample: Sample, key: str) -> float | None:
    """Return the value of a key of a sample; None if it is missing or not finite."""
    value = sample.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _values(file: RolloutFile, rollout: Rollout) -> StepValues:
    names = ("score", "response_length")
    if rollout.is_complete:
        columns = {name: [sample.get(name) for sample in rollout.samples] for name in names}
    else:
        columns = read_columns(file.path, names)
    scores = [score for score in columns["score"] if score is not None and math.isfinite(score)]
    return StepValues(file.step, scores, [float(n) for n in columns["response_length"] if n is not None])


def _ranked_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    def rank(group: list[Sample]) -> int:
        if any("updated_log_probs" in s for s in group):
            return 0
        if any(s.get("failed") for s in group):
            return 1
        return 2 if len({str(s.get("score")) for s in group}) > 1 else 3

    return sorted(group_samples(samples), key=rank)


def _compress(step: int, groups: Sequence[list[Sample]], share: float) -> tuple[str, int]:
    """Return base64 of as many groups as fit into `share` characters, and the number of their samples."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    data, count = b"", 0
    for group in groups:
        chosen = best_to_worst(group, MAX_SAMPLES)
        data += compressor.compress(_group_line(step, chosen)) + compressor.flush(zlib.Z_SYNC_FLUSH)
        count += len(chosen)
        if len(data) * 4 / 3 >= share:
            break
    return base64.b64encode(data + compressor.flush()).decode(), count


def _group_line(step: int, samples: Sequence[Sample]) -> bytes:
    head = samples[0]
    group = {
        "step": step,
        "group": head.get("group"),
        "domain": _short_text(head.get("domain")),
        "id": _short_text(head.get("id")),
        "source": _short_text(head.get("source")),
        "prompt": _truncated(head.get("prompt")),
        "truth": _truncated(head.get("ground_truth")),
        "samples": [_sample_entry(sample) for sample in samples],
    }
    return json.dumps({k: v for k, v in group.items() if v is not None}, separators=(",", ":")).encode() + b"\n"


def _sample_entry(sample: Sample) -> dict[str, Any]:
    """Return what the browser shows of a sample, without values that are missing or malformed."""
    ids = sample.get("response_token_ids")
    response = "" if sample.get("response") is None else str(sample["response"])
    entry: dict[str, Any] = {
        "sample": sample.get("sample"),
        "score": finite_number(sample, "score"),
        "advantage": finite_number(sample, "advantage"),
        "failure": _truncated(sample.get("failure") or "no reason was logged") if sample.get("failed") else None,
        "answer": _truncated(sample.get("answer")),
        "components": _components(sample.get("components")),
        "finish": _short_text(sample.get("finish_reason")),
        "version": sample.get("weights_version"),
        "newest": _newest_version(sample),
        "staleness": sample.get("staleness") or None,
        "length": len(ids) if isinstance(ids, list) else None,
        "characters": len(response),
    }
    tokens = sample.get("response_tokens")
    if isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in tokens):
        num_shown = _num_shown(tokens)
        entry["tokens"] = tokens[:num_shown]
        metrics = _token_metrics(sample, len(tokens), num_shown)
        entry |= {name: _collapse_constant(values) for name, values in metrics.items()}
        if is_episode(sample):
            entry |= episode_entry(sample)
    else:
        entry["response"] = response[:MAX_CHARACTERS]
    return {k: v for k, v in entry.items() if v is not None}


def _newest_version(sample: Sample) -> int | None:
    """Return the newest version that sampled the response if there are several, else None."""
    versions = {run["version"] for run in sample.get("version_runs") or ()}
    return max(versions) if len(versions) > 1 else None


def _token_metrics(sample: Sample, length: int, num_shown: int) -> dict[str, list[float | None]]:
    """Return the per-token metrics that the sample has, rounded, for the first `num_shown` tokens."""
    keys = ("old_log_probs", "rollout_log_probs", "advantages", "updated_log_probs")
    mask = response_mask(sample, length)
    old, engine, advantages, updated = (_token_values(sample.get(key), mask, length, num_shown) for key in keys)
    found: dict[str, list[float | None]] = {}
    if old:
        found["logp"] = [None if v is None else round(v, 4) for v in old]
    if old and engine:
        pairs = zip(old, engine, strict=True)
        found["diff"] = [None if a is None or b is None else float(f"{b - a:.3g}") for a, b in pairs]
    if old and updated:
        pairs = zip(old, updated, strict=True)
        found["ratio"] = [None if a is None or b is None else round(math.exp(min(b - a, 700.0)), 5) for a, b in pairs]
    if advantages:
        found["adv"] = [None if v is None else round(v, 4) for v in advantages]
    return found


def _token_values(values: Any, mask: Sequence[bool] | None, length: int, num_shown: int) -> list[float | None] | None:
    if not isinstance(values, list) or len(values) != (length if mask is None else sum(mask)):
        return None
    if mask is not None:
        values = spread_values(values, mask)
    return [v if isinstance(v, int | float) and math.isfinite(v) else None for v in values[:num_shown]]


def _collapse_constant(values: list[float | None]) -> list[float | None] | float | None:
    """Return a single number if all values are the same: advantages often are."""
    return values[0] if len(set(values)) == 1 and values[0] is not None else values


def _num_shown(tokens: Sequence[str]) -> int:
    """Return how many of the first tokens fit into the limits of tokens and characters."""
    characters = 0
    for i, token in enumerate(tokens[:MAX_TOKENS]):
        characters += len(token)
        if characters > MAX_CHARACTERS:
            return i
    return min(len(tokens), MAX_TOKENS)


def _components(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict):
        return None
    return {str(n): float(v) for n, v in value.items() if isinstance(v, int | float) and math.isfinite(v)} or None


def _short_text(value: Any) -> str | None:
    return None if value is None else str(value)[:200]


def _truncated(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    hidden = len(text) - MAX_CHARACTERS
    return text if hidden <= 0 else f"{text[:MAX_CHARACTERS]}… ({hidden} more characters)"
