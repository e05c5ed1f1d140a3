"""Names of rewards, and building them."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target
from roll_gspo.rewards import REWARDS, RewardRequest, reward_spec
from roll_gspo.rewards.catalog import build_reward

ROLL = "roll.pipeline.rlvr.rewards."
USERS = """
def takes_row(prompt, response, ground_truth, scale=1, **row): return scale * row["points"]
def takes_column(prompt, answer, truth, *, points): return points
def takes_three(prompt, response, ground_truth): return 1
class Made:
    def __init__(self, bonus): self.bonus = bonus
    def __call__(self, prompt, response, ground_truth, **row): return self.bonus + row["points"]
constant = 3
"""
REQUEST = RewardRequest("p", "r", "g", {"points": 2, "prompt": "other", "answer": "other", "scale": 100})


@pytest.fixture(autouse=True)
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_rewards.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("users_rewards", None)


def build(worker_cls, **arguments):
    return build_reward(pickle.loads(pickle.dumps(reward_spec(worker_cls, arguments, "rewards.x"))))


def test_every_registered_reward_exists():
    for name in REWARDS:
        assert callable(import_target(REWARDS[name], name))


@pytest.mark.parametrize(
    ("worker", "name"),
    [
        ("code_sandbox_reward_worker.CodeSandboxRewardWorker", "code_sandbox"),
        ("math_rule_reward_worker.MathRuleRewardWorker", "math_rule"),
        ("ifeval_rule_reward_worker.GeneralRuleRewardWorker", "ifeval"),
        ("multiple_choice_boxed_rule_reward_worker.MultipleChoiceBoxedRuleRewardWorker", "multiple_choice_boxed"),
        ("crossthinkqa_rule_reward_worker.CrossThinkQARuleRewardWorker", "crossthinkqa"),
    ],
)
def test_rolls_workers_have_counterparts(worker, name):
    assert reward_spec(ROLL + worker, {}, "rewards.x") == reward_spec(name, {}, "rewards.x")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (ROLL + "general_val_rule_reward_worker.GeneralValRuleRewardWorker", "not supported yet"),
        ("math_rul", "did you mean 'math_rule'.*code_sandbox, .*exact_match, .*math_rule"),
    ],
)
def test_unknown_name_is_an_error_that_names_key_and_choices(name, told):
    with pytest.raises(ConfigError, match=rf"rewards\.x\.worker_cls: .*{told}"):
        reward_spec(name, {}, "rewards.x")


@pytest.mark.parametrize(
    ("target", "arguments", "score"),
    [
        ("takes_row", {}, 200),
        ("takes_row", {"scale": 3}, 6),
        ("takes_column", {}, 2),
        ("takes_three", {}, 1),
        ("Made", {"bonus": 5}, 7),
    ],
)
def test_users_reward_gets_the_columns_that_it_takes(target, arguments, score):
    assert build(f"users_rewards.{target}", **arguments)(REQUEST) == score
    assert build(f"users_rewards:{target}", **arguments)(REQUEST) == score


@pytest.mark.parametrize(
    ("target", "arguments", "told"),
    [
        ("users_rewards.absent", {}, "has no 'absent'"),
        ("no_such_module.f", {}, "no module 'no_such_module'"),
        ("users_rewards.constant", {}, "is a int"),
        ("users_rewards.takes_row", {"scal": 1}, "no argument scal; its arguments: scale"),
        ("users_rewards.Made", {"bonsu": 1}, "missing a required argument|unexpected"),
        ("exact_match", {"delimeter": ";"}, "unexpected keyword argument 'delimeter'.*delimiter"),
    ],
)
def test_wrong_target_or_argument_is_an_error(target, arguments, told):
    with pytest.raises(ConfigError, match=told):
        build(target, **arguments)


@pytest.mark.parametrize(
    ("response", "arguments", "score", "answer"),
    [
        ("7+6+0=13,3+0+1=4:433", {}, 1, "433"),
        ("1:2: 433\n", {}, 1, "433"),
        ("433:4", {}, 0, "4"),
        ("433", {}, 0, None),
        ("433", {"delimiter": ""}, 1, "433"),
        ("so #### 433", {"delimiter": "####"}, 1, "433"),
        (":", {}, 0, ""),
    ],
)
def test_exact_match_compares_what_follows_the_last_delimiter(response, arguments, score, answer):
    verdict = build("exact_match", **arguments)(RewardRequest("347+86=", response, "433"))
    assert (verdict.score, verdict.answer) == (score, answer)


def test_importing_rewards_does_not_import_torch():
    rules = ("exact_match", "format", "ifeval", "length", "math_rule", "multiple_choice")
    modules = ", ".join(f"roll_gspo.rewards.{name}" for name in (*rules, "worker"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
