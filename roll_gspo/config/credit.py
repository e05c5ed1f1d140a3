"""Keys of the credit of turns, flat at the top level of the YAML, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from roll_gspo.config.base import Problem, Schema, used_only_with
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, RATIOS

TURN_KEYS = ("episode_reward_weight", "step_reward_weight", "turn_baseline")


class CreditConfig(Schema):
    """Settings of episodes of several turns; with one turn, none of them changes a result."""

    credit: Literal["episode", "turn"] = "episode"
    """`episode`: all turns of an episode have the advantage of the sum of their rewards. `turn`: each turn has the
    advantage of its return, the rewards from this turn on."""
    step_reward_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per turn. With `credit: episode` it discounts the rewards of later turns in the sum."""
    episode_reward_weight: NonNegativeFloat = 0.0
    """Weight of the episode's advantage, from the undiscounted sum of the rewards, in that of each turn. Used only with
    `credit: turn`. GiGPO: 1."""
    step_reward_weight: NonNegativeFloat = 1.0
    """Weight of the advantage of the turn's return. Used only with `credit: turn`."""
    turn_baseline: Literal["turn", "group", "state"] = "turn"
    """Turns that a turn is compared with, among the episodes of its group: `turn`: those with the same number, `group`:
    all, `state`: those that follow the same messages of the environment (GiGPO). Used only with `credit: turn`."""

    def is_default(self, key: str) -> bool:
        """Return whether a key has its default."""
        return self.__dict__[key] == type(self).model_fields[key].default


def unused_credit(config: CreditConfig) -> Iterator[Problem]:
    """Yield the keys of turns that are set although every response is one turn."""
    for key in ("credit", "step_reward_gamma"):
        if not config.is_default(key):
            yield used_only_with(key, "train_env_manager")


def broken_credit_rules(
    config: CreditConfig,
    *,
    adv_estimator: str,
    importance_sampling: str,
    policy_loss: str,
    reward_norm: str | None,
    add_token_level_kl: bool,
) -> Iterator[Problem]:
    """Yield settings of turns without effect, and settings with which a turn has no advantage."""
    if config.credit == "episode":
        yield from (used_only_with(key, "credit", "turn") for key in TURN_KEYS if not config.is_default(key))
        return
    declared = ADVANTAGE_ESTIMATORS.declaration(adv_estimator)
    if declared.whole_samples:
        able = [name for name in ADVANTAGE_ESTIMATORS if not ADVANTAGE_ESTIMATORS.declaration(name).whole_samples]
        message = f"turn gives each turn an advantage, and {adv_estimator} {declared.whole_samples}; set adv_estimator"
        yield Problem("credit", f"{message} to one of {', '.join(able)}, or credit: episode", ("adv_estimator",))
    yield from _averaged(importance_sampling, policy_loss)
    compares = declared.compares_group or reward_norm == "group"
    if declared.needs_critic:
        yield from _critic_rules(config, adv_estimator, reward_norm)
    elif add_token_level_kl:
        message = "true has no part in the return of a turn; set use_kl_loss: true instead, or credit: episode"
        yield Problem("add_token_level_kl", message, ("credit",))
    elif not compares and not config.is_default("turn_baseline"):
        yield Problem(
            "turn_baseline",
            f"{config.turn_baseline} has no effect: neither adv_estimator {adv_estimator} nor reward_norm "
            f"{reward_norm or 'null'} compares turns; set adv_estimator: grpo, or remove it",
            ("adv_estimator", "reward_norm"),
        )
    elif adv_estimator == "rloo" and config.turn_baseline != "turn":
        yield Problem(
            "turn_baseline",
            f"{config.turn_baseline} may compare turns of one episode, and rloo leaves out only one of them; set turn, "
            "or adv_estimator: dr_grpo",
            ("adv_estimator",),
        )
    if not config.step_reward_weight and not config.episode_reward_weight:
        message = "0 with episode_reward_weight 0 leaves no advantage; raise one of them"
        yield Problem("step_reward_weight", message, ("episode_reward_weight",))
    if config.episode_reward_weight and reward_norm == "running":
        message = f"{config.episode_reward_weight:g} with reward_norm: running mixes the moments of episodes and turns"
        yield Problem("episode_reward_weight", f"{message}; set 0, or reward_norm=batch", ("reward_norm",))


def _averaged(importance_sampling: str, policy_loss: str) -> Iterator[Problem]:
    """Yield a ratio that trains all tokens of an episode by the mean of its advantages."""
    of_loss = POLICY_LOSSES.declaration(policy_loss).averages_advantages
    of_ratio = RATIOS.declaration(importance_sampling).averages_advantages
    why = "spreads the gradient of each token over the whole episode, so that every turn is trained by the mean of the"
    if of_loss:
        message = f"turn needs a gradient per token, and {policy_loss} {why} advantages; set another policy_loss"
        yield Problem("credit", message, ("policy_loss",))
    elif of_ratio and of_loss is None:
        able = [name for name in RATIOS if not RATIOS.declaration(name).averages_advantages]
        message = f"turn needs a gradient per token, and importance_sampling: {importance_sampling} {why} advantages"
        yield Problem("credit", f"{message}; set {', '.join(able)} (seq_token clips as seq)", ("importance_sampling",))


def _critic_rules(config: CreditConfig, adv_estimator: str, reward_norm: str | None) -> Iterator[Problem]:
    """Yield keys that an estimator with a critic does not read: its values are the baseline of every token."""
    for key in ("step_reward_gamma", *TURN_KEYS):
        if not config.is_default(key):
            message = f"has no effect with adv_estimator: {adv_estimator}, which discounts by gamma and compares with"
            yield Problem(key, f"{message} the critic's values; remove it", ("adv_estimator",))
    if reward_norm is not None:
        message = f"{reward_norm} would compare the rewards of turns with different values; set reward_norm=none"
        yield Problem("reward_norm", message, ("credit", "adv_estimator"))
