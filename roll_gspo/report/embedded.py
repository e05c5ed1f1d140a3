"""The samples that the page carries for its browser: as many as fit, small enough to open and to send."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.report.run_folder import RolloutFile, Sample, read_rollout

MAX_BYTES = 3 * 2**20  # of the page
MAX_READ = 64 * 2**20  # of rollouts/, all files together
MAX_CHARACTERS = 20_000
MAX_TOKENS = 3000
MAX_SAMPLES = 16  # of a group
_GZIP = 31  # window size and header, as zlib counts them


@dataclass(frozen=True)
class Embedded:
    """What the page carries, and what it leaves out.

    Attributes:
        steps: of each step in order (step, gzip of one JSON object a group and line, as base64).
        num_samples: carried.
        num_read: of those that were read; more may be in files that were read in part.
        steps_left_out: that are in rollouts/ and not here.
        read_whole: every file of the carried steps was read to its end.
    """

    steps: list[tuple[int, str]]
    num_samples: int
    num_read: int
    steps_left_out: int
    read_whole: bool


def embedded(files: Sequence[RolloutFile], max_bytes: int = MAX_BYTES, max_read: int = MAX_READ) -> Embedded:
    """Take of each step what its share of `max_bytes` holds, one group at least: first, last, then those between.

    Groups that were scored again after the update come first, then those with a failed reward, then those whose
    scores differ.
    """
    steps: list[tuple[int, str]] = []
    num_samples = num_read = seen = 0
    read_whole = True
    room, may_read = max_bytes, max_read
    for place in spread(len(files)):
        if room <= 0 or may_read <= 0:
            break
        rollout = read_rollout(files[place])
        may_read -= rollout.num_bytes
        share = room / (len(files) - seen)
        seen += 1
        if not rollout.samples:
            continue
        text, count = _packed(rollout.step, _ranked_groups(rollout.samples), share)
        room -= len(text)
        steps.append((rollout.step, text))
        num_samples += count
        num_read += len(rollout.samples)
        read_whole &= rollout.whole
    return Embedded(sorted(steps), num_samples, num_read, len(files) - len(steps), read_whole)


def spread(count: int) -> Iterator[int]:
    """0 to count - 1: the first, the last, the middle, the middles of the halves, and so on."""
    yield from range(min(count, 1))
    yield from range(max(count - 1, 1), count)
    gaps = [(0, count - 1)]
    for low, high in gaps:  # grows while it is read
        middle = (low + high) // 2
        if low < middle < high:
            yield middle
            gaps += [(low, middle), (middle, high)]


def _ranked_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("group")), []).append(sample)

    def rank(group: list[Sample]) -> int:
        if any("updated_log_probs" in s for s in group):
            return 0
        if any(s.get("failed") for s in group):
            return 1
        return 2 if len({str(s.get("score")) for s in group}) > 1 else 3

    return sorted(groups.values(), key=rank)


def _packed(step: int, groups: Sequence[list[Sample]], share: float) -> tuple[str, int]:
    """Base64 of as many groups as `share` characters hold, and how many samples they are."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    data, count = b"", 0
    for group in groups:
        chosen = chosen_samples(group, MAX_SAMPLES)
        data += compressor.compress(_line(step, chosen)) + compressor.flush(zlib.Z_SYNC_FLUSH)
        count += len(chosen)
        if len(data) * 4 / 3 >= share:
            break
    return base64.b64encode(data + compressor.flush()).decode(), count


def chosen_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of a group, evenly from the best to the worst."""
    ranked = sorted(samples, key=lambda s: -(-math.inf if (score := number(s, "score")) is None else score))
    last, shown = len(ranked) - 1, min(count, len(ranked))
    return [ranked[round(i * last / max(shown - 1, 1))] for i in range(shown)]


def _line(step: int, samples: Sequence[Sample]) -> bytes:
    head = samples[0]
    group = {
        "step": step,
        "group": head.get("group"),
        "domain": _text(head.get("domain")),
        "prompt": _cut(head.get("prompt")),
        "truth": _cut(head.get("ground_truth")),
        "samples": [_entry(sample) for sample in samples],
    }
    return json.dumps({k: v for k, v in group.items() if v is not None}, separators=(",", ":")).encode() + b"\n"


def _entry(sample: Sample) -> dict[str, Any]:
    """What the page shows of one sample; what is not known, or not of the right form, is left out."""
    ids = sample.get("response_token_ids")
    response = "" if sample.get("response") is None else str(sample["response"])
    entry: dict[str, Any] = {
        "line": sample.get("line"),
        "score": number(sample, "score"),
        "advantage": number(sample, "advantage"),
        "failure": _cut(sample.get("failure") or "no reason was given") if sample.get("failed") else None,
        "answer": _cut(sample.get("answer")),
        "components": _components(sample.get("components")),
        "finish": _text(sample.get("finish_reason")),
        "version": sample.get("weights_version"),
        "length": len(ids) if isinstance(ids, list) else None,
        "characters": len(response),
    }
    tokens = sample.get("response_tokens")
    if isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in tokens):
        shown = _fitting(tokens)
        entry["tokens"] = tokens[:shown]
        entry |= {name: _short(figures) for name, figures in _figures(sample, len(tokens), shown).items()}
    else:
        entry["response"] = response[:MAX_CHARACTERS]
    return {k: v for k, v in entry.items() if v is not None}


def _figures(sample: Sample, length: int, shown: int) -> dict[str, list[float | None]]:
    """Those figures of a response that there are, for its first `shown` tokens; no more digits than are read."""
    lists = ("old_log_probs", "rollout_log_probs", "advantages", "updated_log_probs")
    old, engine, advantages, updated = (_list(sample.get(name), length, shown) for name in lists)
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


def _list(values: Any, length: int, shown: int) -> list[float | None] | None:
    if not isinstance(values, list) or len(values) != length:
        return None
    return [v if isinstance(v, int | float) and math.isfinite(v) else None for v in values[:shown]]


def _short(figures: list[float | None]) -> list[float | None] | float | None:
    """One figure where all are the same, as advantages often are."""
    return figures[0] if len(set(figures)) == 1 and figures[0] is not None else figures


def _fitting(tokens: Sequence[str]) -> int:
    """How many of the first tokens are shown."""
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


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:200]


def _cut(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]}… ({left} more characters)"


def number(sample: Sample, name: str) -> float | None:
    """A figure of a sample, None where it is missing or not finite."""
    value = sample.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
