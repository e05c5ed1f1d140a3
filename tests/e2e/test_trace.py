"""Per-token log-probs in the files of a run equal those of its models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, computed, rollouts_of

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUNS = Path("out/example_gspo")


def log_probs(model: Any, row: dict[str, Any], temperature: float) -> list[float]:
    """Compute the log-probs of the response tokens with transformers."""
    ids = torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
    first = len(row["prompt_token_ids"])
    return scores[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]].tolist()


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def test_traced_group_has_the_log_probs_of_the_updated_policy(command: Command, small: tuple[str, ...]) -> None:
    from transformers import AutoModelForCausalLM

    arguments = (*HF, *small, "max_steps=2", "actor_train.training_args.save_hf_model=true")
    assert command(*arguments, "run_name=traced").code == 0
    run = RUNS / "traced"
    rows = rollouts_of(run)[2]
    traced = [row for row in rows if "updated_log_probs" in row]
    assert len(traced) == 4 and len({row["group"] for row in traced}) == 1
    assert len({row["score"] for row in traced}) > 1, "a group that teaches something"
    for row in rows:
        length = len(row["response_token_ids"])
        figures = ("response_tokens", "rollout_log_probs", "old_log_probs", "advantages")
        assert [len(row[name]) for name in figures] == [length] * 4
        assert "".join(row["response_tokens"]) == row["response"]
        assert row["rollout_log_probs"] == pytest.approx(row["old_log_probs"], abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_000002/actor_train_hf", dtype=torch.float32)
    for row in traced:
        assert row["updated_log_probs"] == pytest.approx(log_probs(model.eval(), row, 1.0), abs=1e-4)
    moved = [
        abs(after - before)
        for row in traced
        for after, before in zip(row["updated_log_probs"], row["old_log_probs"], strict=True)
    ]
    assert max(moved) > 1e-4, "the update did change the policy"

    assert command(*arguments, "run_name=untraced", "trace_groups=0").code == 0
    assert computed(RUNS / "untraced") == computed(run), "tracing changes nothing"
    without = {step: [_without(row, "updated_log_probs") for row in rows] for step, rows in rollouts_of(run).items()}
    assert rollouts_of(RUNS / "untraced") == without
