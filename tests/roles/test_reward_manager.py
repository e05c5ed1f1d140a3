from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.errors import ConfigError, DataError
from roll_gspo.rewards.__main__ import main as try_reward
from roll_gspo.roles.reward_manager import RewardManager

MINE = """
def length(prompt, response, ground_truth, unit=1):
    return len(response) * unit

def row(prompt, response, ground_truth, **columns):
    assert prompt == "text of c" and ground_truth == "z"
    return columns["weight"] + ("ground_truth" in columns)

def misspelt(prompt, response, ground_truth):
    return lenght(response)

def needs_form(prompt, response, ground_truth):
    return response.index("#")
"""


@pytest.fixture
def reward_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardManager]:
    """Three domains: a shipped reward, a function with an argument, a function that reads columns of the row."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    reward_manager = RewardManager(
        {
            "exact": RewardConfig(worker_cls="exact_match", worker_args={"delimiter": ":"}),
            "long": RewardConfig(worker_cls="my_rewards.length", worker_args={"unit": 2}, tag_included=("prose",)),
            "row": RewardConfig(worker_cls="my_rewards:row"),
        }
    )
    yield reward_manager
    reward_manager.close()


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


def test_each_sample_is_scored_by_the_reward_of_its_domain_or_tag(reward_manager: RewardManager) -> None:
    reward_manager.check(p.row for p in PROMPTS)
    calls: list[tuple[int, int]] = []
    results = reward_manager.score(ROLLOUTS, ["so: 42", "four", "", "no: 42"], lambda *c: calls.append(c))
    assert [(r.score, r.failed) for r in results] == [(1.0, None), (8.0, None), (7.0, None), (0.0, None)]
    assert reward_manager.domains(PROMPTS) == ["exact", "long", "row", "exact"]
    assert calls, "progress is reported"
    reward_manager.close()
    reward_manager.close()


def test_row_without_a_reward_is_found_before_training(reward_manager: RewardManager) -> None:
    with pytest.raises(DataError, match="domain 'poetry' and tag ''"):
        reward_manager.check([{"id": "1", "domain": "poetry", "tag": ""}])


def test_reward_that_cannot_be_made_is_found_before_training(tmp_path: Path) -> None:
    reward_manager = RewardManager({"mine": RewardConfig(worker_cls="not_there.f")})
    with pytest.raises(ConfigError, match=r"rewards\.mine.*no module 'not_there'"):
        reward_manager.check([])
    reward_manager.close()


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        ("misspelt", r"rewards\.mine: a trial on row a failed: NameError: .*lenght.*\n.*my_rewards\.py\", line 10, in"),
        ("later", "is async"),
    ],
)
def test_reward_that_can_never_work_fails_on_one_row(
    reward_manager: RewardManager, tmp_path: Path, reward: str, match: str
) -> None:
    with (tmp_path / "my_rewards.py").open("a") as file:
        file.write("async def later(prompt, response, ground_truth): return 1\n")
    wrong = RewardManager({"mine": RewardConfig(worker_cls=f"my_rewards.{reward}", world_size=1)})
    with pytest.raises(ConfigError, match=match):
        wrong.check([PROMPTS[0].row | {"domain": "mine"}])
    wrong.close()


def test_reward_that_depends_on_the_response_is_a_warning(
    reward_manager: RewardManager, caplog: pytest.LogCaptureFixture
) -> None:
    strict = RewardManager({"mine": RewardConfig(worker_cls="my_rewards.needs_form", world_size=1)})
    strict.check([PROMPTS[0].row | {"domain": "mine"}])
    strict.close()
    assert "a trial on row a failed: ValueError: substring not found" in caplog.text
    assert 'my_rewards.py", line 13, in needs_form' in caplog.text


def test_rewards_are_tried_from_the_command_line(
    reward_manager: RewardManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"row {i}", "question": "1+1=", "answer": "2"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["try", "my_rewards.length", str(tmp_path / "rows.jsonl"), "--rows", "1"]
    assert try_reward([*command, "--response", "seven", "--args", '{"unit": 3}']) == 0
    assert capsys.readouterr().out == "row 0  ground truth '2'  score 15\n"
    assert try_reward(["try", "my_rewards.needs_form", *command[2:]]) == 1
    out = capsys.readouterr().out
    assert "failed: ValueError: substring not found" in out and 'my_rewards.py", line 13, in needs_form' in out
    assert try_reward(["try", "my_rewards.nothing", *command[2:]]) == 2
    assert "module 'my_rewards' has no 'nothing'" in capsys.readouterr().err
