"""`builtin:multi_domain`: the reward of each domain gives the maximum score to the shipped responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.data import multi_domain
from roll_gspo.rewards.base import RewardOutput, RewardRequest
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.spec import build_reward
from roll_gspo.sandbox import SandboxError

SPLITS = ("train", "validation")


def responses(domain: str) -> dict[str, str]:
    """Return the shipped response of each row by id."""
    files = [file for split in SPLITS for file in multi_domain.files(split) if domain in file]
    rows = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["response"] for row in rows if row["domain"] == domain}


@pytest.mark.parametrize("domain", multi_domain.DOMAINS)
def test_shipped_responses_score_the_maximum_and_others_do_not(domain: str) -> None:
    config = load_config("example_multi_domain").config
    try:
        reward = build_reward(spec_from_config(config.rewards[domain], f"rewards.{domain}"))
    except SandboxError as error:
        pytest.skip(str(error))
    assert callable(reward)
    correct = responses(domain)
    rows = [row for split in SPLITS for row in multi_domain.rows(split) if row.domain == domain]
    assert len(rows) == len(correct) > 60
    maximum = 1.1 if domain == "math" else 1.0
    for row in rows[:: 4 if domain == "code" else 1]:
        columns = {**row.extra, "id": row.id}
        output = reward(RewardRequest(row.messages[0]["content"], correct[row.id], row.ground_truth, columns))
        assert isinstance(output, RewardOutput) and output.score == pytest.approx(maximum), (row.id, output)
        wrong = reward(RewardRequest(row.messages[0]["content"], "I, myself, do not know", row.ground_truth, columns))
        assert wrong.score < maximum, row.id


def test_splits_share_no_prompt_and_slip_rate_equals_slip_probability() -> None:
    train, held_out = ({row.messages[0]["content"] for row in multi_domain.rows(split)} for split in SPLITS)
    assert not train & held_out and len(train) == 250 and len(held_out) == 62
    correct = {(row.messages[0]["content"], responses(row.domain)[row.id]) for row in multi_domain.rows("train")}
    assert set(multi_domain.demonstrations(400, 0, 0.0)) <= correct
    slips = sum(pair not in correct for pair in multi_domain.demonstrations(4000, 0, 0.25))
    assert 850 < slips < 1150
    assert multi_domain.demonstrations(50, 3, 0.25) == multi_domain.demonstrations(50, 3, 0.25)
