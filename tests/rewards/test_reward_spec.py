"""Reward specs: resolving names, and building shipped rewards and rewards of users."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from roll_gspo.config.reward_table import SHIPPED_REWARDS
from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target
from roll_gspo.rewards import RewardRequest, reward_spec
from roll_gspo.rewards.spec import build_reward

ROLL = "roll.pipeline.rlvr.rewards."
USER_MODULE = """
def takes_row(prompt, response, ground_truth, scale=1, **row): return scale * row["points"]
def takes_column(prompt, answer, truth, *, points): return points
def takes_three(prompt, response, ground_truth): return 1
class Bonus:
    def __init__(self, bonus): self.bonus = bonus
    def __call__(self, prompt, response, ground_truth, **row): return self.bonus + row["points"]
constant = 3
def takes_two(prompt, response): return 1
def by_name(*, prompt, response, ground_truth): return 1
async def later(prompt, response, ground_truth): return 1
class Later:
    async def __call__(self, prompt, response, ground_truth): return 1
class LaterBatch:
    async def score_batch(self, requests): return [1.0] * len(requests)
class NoBatch:
    def score_batch(self): return []
"""
REQUEST = RewardRequest("p", "r", "g", {"points": 2, "prompt": "other", "answer": "other", "scale": 100})


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("user_rewards", None)


def build(worker_cls, **arguments):
    return build_reward(pickle.loads(pickle.dumps(reward_spec(worker_cls, arguments, "rewards.x"))))


def test_every_shipped_reward_can_be_imported():
    for name, reward in SHIPPED_REWARDS.items():
        assert callable(import_target(reward.target, name))


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
def test_roll_worker_resolves_to_shipped_reward(worker, name):
    assert reward_spec(ROLL + worker, {}, "rewards.x") == reward_spec(name, {}, "rewards.x")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (ROLL + "general_val_rule_reward_worker.GeneralValRuleRewardWorker", "GeneralValRuleRewardWorker.*math_rule"),
        ("math_rul", "'math_rul'.*'math_rule'.*code_sandbox, .*exact_match, .*math_rule"),
    ],
)
def test_unknown_name_raises_with_key_and_choices(name, match):
    with pytest.raises(ConfigError, match=rf"^rewards\.x\.worker_cls: .*{match}"):
        reward_spec(name, {}, "rewards.x")


@pytest.mark.parametrize(
    ("target", "arguments", "score"),
    [
        ("takes_row", {}, 200),
        ("takes_row", {"scale": 3}, 6),
        ("takes_column", {}, 2),
        ("takes_three", {}, 1),
        ("Bonus", {"bonus": 5}, 7),
    ],
)
def test_user_reward_receives_arguments_and_columns(target, arguments, score):
    assert build(f"user_rewards.{target}", **arguments)(REQUEST) == score
    assert build(f"user_rewards:{target}", **arguments)(REQUEST) == score


@pytest.mark.parametrize(
    ("target", "arguments", "match"),
    [
        ("user_rewards.absent", {}, "user_rewards.*'absent'"),
        ("no_such_module.f", {}, "'no_such_module'"),
        ("user_rewards.constant", {}, "user_rewards.constant is of type int"),
        ("user_rewards.takes_row", {"scal": 1}, r"user_rewards\.takes_row: .* scal \(known: scale\)"),
        ("user_rewards.Bonus", {"bonsu": 1}, r"user_rewards\.Bonus: .*'bonus?u?'"),
        ("exact_match", {"delimeter": ";"}, "exact_match: .*'delimeter'.*delimiter"),
    ],
)
def test_wrong_target_or_argument_raises(target, arguments, match):
    with pytest.raises(ConfigError, match=match):
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
def test_exact_match_compares_the_text_after_the_last_delimiter(response, arguments, score, answer):
    output = build("exact_match", **arguments)(RewardRequest("347+86=", response, "433"))
    assert (output.score, output.answer) == (score, answer)


def test_importing_rewards_does_not_import_torch():
    rules = ("exact_match", "format", "ifeval", "length", "math_rule", "multiple_choice")
    modules = ", ".join(f"roll_gspo.rewards.{name}" for name in (*rules, "worker"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("takes_two", r"cannot be called as \(prompt, response, ground_truth\): too many positional"),
        ("by_name", "cannot be called as"),
        ("later", "later is async.*asyncio.run"),
        ("Later", "is async"),
        ("LaterBatch", "is async"),
        ("NoBatch", r"cannot be called as score_batch\(requests\)"),
    ],
)
def test_reward_with_a_wrong_signature_is_rejected(name, match):
    with pytest.raises(ConfigError, match=match):
        build(f"user_rewards.{name}")


def test_missing_argument_is_named():
    reward = build("user_rewards.takes_column")
    assert reward(REQUEST) == 2
    with pytest.raises(ConfigError, match=r"no value for points; set it in worker_args.*row 7 has none"):
        reward(RewardRequest("p", "r", "g", {"id": "7"}))
