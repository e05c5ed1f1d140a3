from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.errors import ConfigError, DataError
from roll_gspo.roles.reward_manager import RewardManager

MINE = """
def length(prompt, response, ground_truth, unit=1):
    return len(response) * unit

def row(prompt, response, ground_truth, **columns):
    assert prompt == "text of c" and ground_truth == "z"
    return columns["weight"] + ("ground_truth" in columns)
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardManager]:
    """Three domains: a shipped reward, a function with an argument, a function that reads columns of the row."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    judge = RewardManager(
        {
            "exact": RewardConfig(worker_cls="exact_match", worker_args={"delimiter": ":"}),
            "long": RewardConfig(worker_cls="my_rewards.length", worker_args={"unit": 2}, tag_included=("prose",)),
            "row": RewardConfig(worker_cls="my_rewards:row"),
        }
    )
    yield judge
    judge.close()


def prompt(name: str, truth: str = "z", **columns: object) -> Prompt:
    row = {"id": name, "ground_truth": truth, "domain": "", "tag": "", **columns}
    return Prompt((1,), f"text of {name}", row)


PROMPTS = [
    prompt("a", "42", domain="exact"),
    prompt("b", tag="prose"),
    prompt("c", domain="row", weight=7),
    prompt("d", "43", domain="exact"),
]
ROLLOUTS = Rollouts.collate(PROMPTS, [[Completion((5,), (-1.0,), "stop")]] * 4, pad=0, weights_version=0)


def test_each_sample_is_scored_by_the_reward_of_its_domain_or_tag(judge: RewardManager) -> None:
    judge.check(p.row for p in PROMPTS)
    calls: list[tuple[int, int]] = []
    results = judge.score(ROLLOUTS, ["so: 42", "four", "", "no: 42"], lambda *c: calls.append(c))
    assert [(r.score, r.failed) for r in results] == [(1.0, None), (8.0, None), (7.0, None), (0.0, None)]
    assert judge.domains(PROMPTS) == ["exact", "long", "row", "exact"]
    assert calls, "progress is reported"
    judge.close()
    judge.close()


def test_row_without_a_reward_is_found_before_training(judge: RewardManager) -> None:
    with pytest.raises(DataError, match="domain 'poetry' and tag ''"):
        judge.check([{"id": "1", "domain": "poetry", "tag": ""}])


def test_reward_that_cannot_be_made_is_found_before_training(tmp_path: Path) -> None:
    judge = RewardManager({"mine": RewardConfig(worker_cls="not_there.f")})
    with pytest.raises(ConfigError, match=r"rewards\.mine.*no module 'not_there'"):
        judge.check([])
    judge.close()
