"""Samples for readers without JavaScript: a few prompts of a few steps with their responses."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from roll_gspo.report.embedded import best_to_worst, finite_number, group_samples
from roll_gspo.report.numbers import format_number
from roll_gspo.report.run_folder import Rollout
from roll_gspo.rollout_files import Sample

_MAX_GROUPS = 2
_MAX_SAMPLES = 4
_MAX_CHARACTERS = 6000


def samples_section(rollouts: Sequence[Rollout]) -> str:
    """Return the steps as collapsible blocks, the last one open."""
    blocks = []
    for rollout in rollouts:
        scores = [score for sample in rollout.samples if (score := finite_number(sample, "score")) is not None]
        mean = f", mean score {format_number(sum(scores) / len(scores))}" if scores else ""
        groups = "".join(_group(group) for group in _chosen_groups(rollout.samples))
        is_open = " open" if rollout is rollouts[-1] else ""
        blocks.append(
            f"<details class=step{is_open}><summary><b>Step {rollout.step}</b> "
            f"<span>{len(rollout.samples)} samples{mean}</span></summary>{groups}</details>"
        )
    return "".join(blocks)


def _chosen_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the first groups, those whose scores differ before others."""
    return sorted(group_samples(samples), key=lambda group: len({str(s.get("score")) for s in group}) < 2)[:_MAX_GROUPS]


def _group(samples: Sequence[Sample]) -> str:
    chosen = best_to_worst(samples, _MAX_SAMPLES)
    head = chosen[0]
    facts = [f"group {head.get('group')}", f"{len(chosen)} of {len(samples)} responses, best to worst"]
    facts = [*(str(head[name]) for name in ("domain", "source", "id") if head.get(name)), *facts]
    truth = head.get("ground_truth")
    answer = f"<h5>Ground truth</h5>{_text(truth)}" if truth is not None else ""
    responses = "".join(_response(sample) for sample in chosen)
    return (
        f'<article class="group"><p class="facts">{escape(" · ".join(facts))}</p>'
        f'<div class="pair"><div><h5>Prompt</h5>{_text(head.get("prompt"))}{answer}</div>'
        f"<div>{responses}</div></div></article>"
    )


def _response(sample: Sample) -> str:
    score, advantage = finite_number(sample, "score"), finite_number(sample, "advantage")
    tone = "" if not advantage else " good" if advantage > 0 else " bad"
    facts = [f'<span class="score{tone}">score {"unknown" if score is None else format_number(score)}</span>']
    if advantage is not None:
        facts.append(f"advantage {advantage:+.3f}")
    if isinstance(sample.get("response_token_ids"), list):
        facts.append(f"{len(sample['response_token_ids'])} tokens")
    if end := sample.get("end"):
        facts.append(f"{len(sample.get('turns') or ())} turns, end {escape(str(end))}")
    elif sample.get("finish_reason") == "length":
        facts.append("truncated at the length limit")
    if sample.get("failed"):
        facts.append(f'<span class="score bad">{"environment" if end else "reward"} failed</span>')
    return f'<div class="response"><p class="facts">{" · ".join(facts)}</p>{_text(sample.get("response"))}</div>'


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    hidden = len(text) - _MAX_CHARACTERS
    more = f"… ({hidden} more characters)" if hidden > 0 else ""
    return f"<pre>{escape(text[:_MAX_CHARACTERS])}{more}</pre>"
