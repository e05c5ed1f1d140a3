"""What the policy said: a few prompts of a few steps with the responses sampled for them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from roll_gspo.report.curves import figure
from roll_gspo.report.embedded import chosen_samples, number
from roll_gspo.report.run_folder import Rollout, Sample

_GROUPS = 2
_SAMPLES = 4
_MAX_CHARACTERS = 6000


def rollouts_section(rollouts: Sequence[Rollout]) -> str:
    """The steps as collapsible blocks, the last one open."""
    blocks = []
    for rollout in rollouts:
        scores = [s for s in (number(sample, "score") for sample in rollout.samples) if s is not None]
        mean = f", mean score {figure(sum(scores) / len(scores))}" if scores else ""
        groups = "".join(_group(group) for group in _chosen_groups(rollout.samples))
        is_open = " open" if rollout is rollouts[-1] else ""
        blocks.append(
            f"<details class=step{is_open}><summary><b>Step {rollout.step}</b> "
            f"<span>{len(rollout.samples)} samples{mean}</span></summary>{groups}</details>"
        )
    return "".join(blocks)


def _chosen_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The groups that say most: the first ones whose scores differ, else the first ones."""
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("group")), []).append(sample)
    ordered = sorted(groups.values(), key=lambda g: len({str(s.get("score")) for s in g}) < 2)
    return ordered[:_GROUPS]


def _group(samples: Sequence[Sample]) -> str:
    chosen = chosen_samples(samples, _SAMPLES)
    head = chosen[0]
    facts = [f"group {head.get('group')}", f"{len(chosen)} of {len(samples)} responses, best to worst"]
    if head.get("domain") is not None:
        facts.insert(0, str(head["domain"]))
    truth = head.get("ground_truth")
    answer = f"<h5>Ground truth</h5>{_text(truth)}" if truth is not None else ""
    responses = "".join(_response(sample) for sample in chosen)
    return (
        f'<article class="group"><p class="facts">{escape(" · ".join(facts))}</p>'
        f'<div class="pair"><div><h5>Prompt</h5>{_text(head.get("prompt"))}{answer}</div>'
        f"<div>{responses}</div></div></article>"
    )


def _response(sample: Sample) -> str:
    score, advantage = number(sample, "score"), number(sample, "advantage")
    tone = "" if not advantage else " good" if advantage > 0 else " bad"
    facts = [f'<span class="score{tone}">score {"unknown" if score is None else figure(score)}</span>']
    if advantage is not None:
        facts.append(f"advantage {advantage:+.3f}")
    if isinstance(sample.get("response_token_ids"), list):
        facts.append(f"{len(sample['response_token_ids'])} tokens")
    if sample.get("finish_reason") == "length":
        facts.append("cut at the length limit")
    if sample.get("failed"):
        facts.append('<span class="score bad">reward failed</span>')
    return f'<div class="response"><p class="facts">{" · ".join(facts)}</p>{_text(sample.get("response"))}</div>'


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    cut = f"… ({len(text) - _MAX_CHARACTERS} more characters)" if len(text) > _MAX_CHARACTERS else ""
    return f"<pre>{escape(text[:_MAX_CHARACTERS])}{cut}</pre>"
