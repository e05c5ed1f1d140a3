"""Keys of the algorithm, flat at the top level of the YAML, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from roll_gspo.config.base import Problem, used_only_with
from roll_gspo.config.clip_range import ClipHigh, ClipLow, ClipRange, default_clip_range
from roll_gspo.config.credit import CreditConfig, broken_credit_rules
from roll_gspo.config.functions import Selects
from roll_gspo.config.selection import (
    MismatchGateConfig,
    QueryFilterConfig,
    StalenessGateConfig,
    TrainInferCorrectionConfig,
)
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, EXTENSIBLE, POLICY_LOSSES, RATIOS
from roll_gspo.errors import RollGspoError
from roll_gspo.registry import did_you_mean

LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RewardNorm = Literal["group", "batch", "running"]
KlEstimator = Literal["kl", "abs", "mse", "k3"]
ClipFraction = Annotated[float, Field(gt=0, lt=1)]
Arguments = Annotated[dict[str, JsonValue], Field(default_factory=dict)]


def _none_if_empty(value: Any) -> Any:
    return None if value == {} else value


def _alternatives(names: list[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


AUTO = "auto"  # value of a switch that follows the policy loss


class AlgorithmConfig(CreditConfig):
    """Settings of the objective. `docs/algorithms.md` has the formulas."""

    adv_estimator: Annotated[str, Selects(ADVANTAGE_ESTIMATORS)] = "reinforce"
    """Estimator that turns rewards into advantages. An estimator that uses a critic needs the block `critic`."""
    adv_estimator_args: Arguments
    """Keyword arguments of your own `adv_estimator`."""
    importance_sampling: Annotated[str, Selects(RATIOS)] = "token"
    """Level of the importance ratio: `token` (PPO, GRPO), `seq` (GSPO), `seq_token` (GSPO-token), `segment` (`seq` for
    each contiguous run of response tokens: one assistant turn)."""
    importance_sampling_args: Arguments
    """Keyword arguments of your own `importance_sampling`."""
    policy_loss: Annotated[str, Selects(POLICY_LOSSES)] = "clip"
    """Loss per token as a function of ratio and advantage."""
    policy_loss_args: Arguments
    """Keyword arguments of your own `policy_loss`."""
    loss_agg_mode: LossAggMode = "seq-mean-token-mean"
    """Aggregation of token losses into one loss. Denominators span the whole mini-batch."""
    ppo_epochs: PositiveInt = 1
    """Passes over each rollout."""

    pg_clip: ClipFraction = 0.2
    """Symmetric clip range of the ratio, used unless `use_pg_clip_range`."""
    use_pg_clip_range: bool = False
    """Clip to [1 - pg_clip_low, 1 + pg_clip_high] instead of 1 ± pg_clip. `auto`: true if `policy_loss` has a clip
    range. The options of `importance_sampling` set `auto`."""
    pg_clip_low: ClipLow | None = None
    """Lower clip range; 1 means no lower bound. Used only with `use_pg_clip_range`. Null: the range of `policy_loss`
    (cispo, gmpo), else that of `pg_clip_ranges`, else that of `importance_sampling`."""
    pg_clip_high: ClipHigh | None = None
    """Upper clip range. Used only with `use_pg_clip_range`. Null: same rule as `pg_clip_low`."""
    pg_clip_ranges: dict[str, ClipRange] = Field(default_factory=dict)
    """Default clip ranges [low, high] by `importance_sampling`, e.g. `{token: [0.2, 0.28]}`. Presets set it, so that
    their range applies to one level of the ratio only."""
    pg_clip_length_scaling: bool = False
    """Divide the clip range by the square root of the response's length, so that long and short responses are clipped
    equally often (FSPO). Needs `importance_sampling: seq` or `seq_token`. Default range: 0.03 on both sides."""
    dual_clip_loss: bool = False
    """Bound the loss of samples with negative advantage by `dual_clip_ratio` times the advantage. `auto`: true if
    `policy_loss` allows it (clip)."""
    dual_clip_ratio: Annotated[float, Field(gt=1)] | None = None
    """Constant of the dual clip; null: 1 + 2 * pg_clip."""
    sapo_tau_positive: PositiveFloat = 1.0
    """Temperature of SAPO's gate for positive advantages."""
    sapo_tau_negative: PositiveFloat = 1.05
    """Temperature of SAPO's gate for negative advantages. A higher value closes the gate sooner."""
    vespo_k_positive: PositiveFloat = 2.0
    """Exponent of VESPO's weight for positive advantages. A higher value suppresses unlikely responses more."""
    vespo_lambda_positive: PositiveFloat = 3.0
    """Decay of VESPO's weight for positive advantages. A higher value suppresses likely responses more."""
    vespo_k_negative: PositiveFloat = 3.0
    """Exponent of VESPO's weight for negative advantages."""
    vespo_lambda_negative: PositiveFloat = 2.0
    """Decay of VESPO's weight for negative advantages."""
    dppo_divergence: Literal["tv", "kl"] = "tv"
    """Divergence of DPPO's trust region: total variation or KL of the sampled token against all others."""
    dppo_threshold: PositiveFloat = 0.15
    """Divergence beyond which a token that moves further away loses its gradient; the paper has 0.05 for `kl`."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Exclude samples with negative advantage from the policy loss if their KL per token from the generation engine to
    the current policy is above this value (off-policy sequence masking); null: off."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of a rollout's tokens that the policy loss sees: those with the highest entropy. 1: all."""

    reward_norm: RewardNorm | None = None
    """Normalise scores over their group, the batch or the whole run; null: no normalisation."""
    reward_shift: bool = False
    """Subtract the mean without dividing by the standard deviation. Needs `reward_norm`."""
    reward_scale: bool = False
    """Divide by the standard deviation without subtracting the mean. Needs `reward_norm`."""
    reward_clip: PositiveFloat | None = None
    """Clamp rewards to ± this value after normalisation. An estimator that compares the samples of a prompt is part of
    the normalisation."""
    overlong_buffer_length: PositiveInt | None = None
    """Number of tokens before `response_length` with a soft length penalty (DAPO), or, below 1, their share of
    `response_length`; null: no penalty."""
    overlong_penalty_factor: PositiveFloat = 1.0
    """Penalty of a response at `response_length`. Used only with `overlong_buffer_length`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount factor per token."""
    lambd: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of GAE: 0 relies on the critic, 1 on the rewards."""
    value_clip: PositiveFloat | None = None
    """Clip the critic's values to ± this range around its values at the start of the step."""
    critic_warmup: NonNegativeInt = 0
    """Number of rollouts at the start of the run that train only the critic."""
    whiten_advantages: bool = False
    """Normalise advantages to zero mean and unit variance over all valid tokens of the batch. It has no further effect
    with reinforce_plus_plus and reinforce_plus_plus_baseline, which already do this."""
    advantage_clip: PositiveFloat | None = None
    """Clamp advantages to ± this value."""

    max_len_mask: bool = False
    """Exclude responses that were truncated at `response_length` from the loss."""
    difficulty_mask: bool = False
    """Exclude groups from the loss if their mean score is not between the two thresholds."""
    difficulty_low_threshold: float = 0.0
    """Groups with a mean score at or below this are too hard. Used only with `difficulty_mask`."""
    difficulty_high_threshold: float = 1.0
    """Groups with a mean score at or above this are too easy. Used only with `difficulty_mask`."""
    length_loss_weight: bool = False
    """Give short responses more weight: from 1.5 for the shortest of a rollout to 0.5 for the longest."""
    difficulty_loss_weight: bool = False
    """Give hard prompts more weight: from 0.5 to 2 by `difficulty` (0 to 1), a column that every data row needs."""
    query_filter_config: QueryFilterConfig | None = None
    """Dynamic sampling: drop groups without a learning signal and generate others in their place; null: off. The same
    key in a block of `rewards` overrides this one for that domain."""
    max_sampling_rounds: PositiveInt = 10
    """A step draws at most this many times `rollout_batch_size` prompts; then dropped groups fill the batch. Used only
    with `query_filter_config`."""

    use_kl_loss: bool = False
    """Add `kl_loss_coef` times the divergence from the reference model to the loss."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the KL loss."""
    kl_loss_type: KlEstimator = "k3"
    """Estimator of the KL loss."""
    add_token_level_kl: bool = False
    """Subtract beta times the divergence from the reference model from the reward of every token."""
    init_kl_coef: PositiveFloat | None = None
    """Initial beta. Used only with `add_token_level_kl`."""
    target_kl: PositiveFloat | None = None
    """Divergence per token that an adaptive beta targets; null keeps beta fixed."""
    kl_horizon: PositiveInt = 10000
    """Horizon of the adaptive beta in samples; a larger value adapts more slowly."""
    kl_penalty: KlEstimator = "kl"
    """Estimator of the token-level KL."""
    entropy_loss_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    enable_old_logprobs_recompute: bool = True
    """Compute old log-probs with the trainer before its first update; false: use those of the generation engine."""
    train_infer_correction: Annotated[TrainInferCorrectionConfig | None, BeforeValidator(_none_if_empty)] = None
    """Weight the loss by the ratio of trainer to generation-engine probabilities; null: off."""
    staleness_gate: StalenessGateConfig | None = None
    """Act on a rollout whose importance weights, trainer before the update over generation engine, have a small
    effective sample size; null: off."""
    mismatch_gate: MismatchGateConfig | None = MismatchGateConfig()
    """Compare trainer and generation engine before the first update of every process, so also after a resume; null:
    off."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the gradient to this norm."""
    max_consecutive_skipped_steps: PositiveInt = 3
    """Stop after this many consecutive optimizer steps were skipped because of non-finite values."""

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in the switches that are `auto`, and the clip range of policy loss and ratio."""
        values = super().fill_defaults(values)
        loss, level = (values.get(key, cls.model_fields[key].default) for key in ("policy_loss", "importance_sampling"))
        try:
            declared = POLICY_LOSSES.declaration(loss)
            scaled = values.get("pg_clip_length_scaling") is True
            default = default_clip_range(loss, level, values.get("pg_clip_ranges", {}), scaled)
        except (RollGspoError, TypeError):  # the fields report what is wrong
            return {key: value for key, value in values.items() if value != AUTO}
        for key, is_on in (
            ("use_pg_clip_range", declared.needs_clip_range),
            ("dual_clip_loss", declared.allows_dual_clip),
        ):
            if values.get(key) == AUTO:
                values[key] = is_on
        if values.get("use_pg_clip_range") is True and default is not None:
            for key, bound in (("pg_clip_low", default.low), ("pg_clip_high", default.high)):
                values[key] = bound if values.get(key) is None else values[key]
        return values

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """Clip range (low, high) of the ratio around 1; None if the objective does not clip."""
        if not POLICY_LOSSES.declaration(self.policy_loss).needs_clip_range:
            return None
        if self.use_pg_clip_range:
            assert self.pg_clip_low is not None and self.pg_clip_high is not None  # checked by _broken_clip_rules
            return self.pg_clip_low, self.pg_clip_high
        return self.pg_clip, self.pg_clip

    @property
    def clip_range_origin(self) -> str:
        """The key that decides the clip range, e.g. `importance_sampling: seq` or `pg_clip`."""
        if not self.use_pg_clip_range:
            return "pg_clip"
        default = default_clip_range(
            self.policy_loss, self.importance_sampling, self.pg_clip_ranges, self.pg_clip_length_scaling
        )
        is_default = default is not None and self.clip_range == (default.low, default.high)
        return default.origin if default is not None and is_default else "pg_clip_low, pg_clip_high"

    @property
    def effective_dual_clip_ratio(self) -> float | None:
        """Constant of the dual clip; None if it is off."""
        if not self.dual_clip_loss:
            return None
        return self.dual_clip_ratio or 1 + 2 * self.pg_clip

    @property
    def importance_level(self) -> str:
        """Level of the importance weights, trainer over generation engine, in `staleness/ess`."""
        if self.staleness_gate is not None and self.staleness_gate.level is not None:
            return self.staleness_gate.level
        return "sequence" if self.train_infer_correction is None else self.train_infer_correction.level

    @property
    def needs_reference(self) -> bool:
        """True if the loss or the reward uses reference log-probs."""
        needed_by_loss = POLICY_LOSSES.declaration(self.policy_loss).needs_reference
        return self.use_kl_loss or self.add_token_level_kl or needed_by_loss

    @property
    def needs_critic(self) -> bool:
        """True if the advantage estimator uses a critic's values."""
        return ADVANTAGE_ESTIMATORS.declaration(self.adv_estimator).needs_critic

    @property
    def filters_groups(self) -> bool:
        """True if dynamic sampling is on."""
        return self.query_filter_config is not None and self.query_filter_config.type != "no_filter"

    def broken_rules(self) -> Iterator[Problem]:
        """Yield switches without required keys, keys without their switch, and mutually exclusive switches."""
        yield from super().broken_rules()
        yield from self._broken_function_rules()
        yield from self._broken_clip_rules()
        yield from self._broken_reward_rules()
        yield from self._broken_kl_rules()
        yield from self._broken_correction_rules()
        keys = ("adv_estimator", "importance_sampling", "policy_loss", "reward_norm", "add_token_level_kl")
        yield from broken_credit_rules(self, **{key: self.__dict__[key] for key in keys})
        yield from self._keys_without_effect()

    def _broken_function_rules(self) -> Iterator[Problem]:
        """Yield arguments that the selected functions do not take, and a ratio that the policy loss ignores."""
        for key, functions in EXTENSIBLE.items():
            name, arguments = self.__dict__[key], self.__dict__[f"{key}_args"]
            if name in functions and arguments:
                message = f"is used only with the dotted path of your function as {key}, not with {name}; remove it"
                yield Problem(f"{key}_args", message, (key,))
            elif name not in functions and (problem := functions.argument_problem(name, arguments)):
                yield Problem(f"{key}_args", problem, (key,))
            if unknown := set(functions.declaration(name).reads) - set(type(self).model_fields):
                yield Problem(key, f"{name} declares to read unknown keys ({', '.join(sorted(unknown))}); remove them")
        own_ratio = POLICY_LOSSES.declaration(self.policy_loss).own_ratio
        if own_ratio and self.importance_sampling != "token":
            yield Problem(
                "policy_loss",
                f"{self.policy_loss} computes the ratio of a whole response itself ({own_ratio}), so "
                f"importance_sampling: {self.importance_sampling} would be ignored; set importance_sampling: token",
                ("importance_sampling",),
            )
        if ADVANTAGE_ESTIMATORS.declaration(self.adv_estimator).normalises_scores and self.reward_norm is not None:
            message = f"{self.reward_norm} would come before {self.adv_estimator}, which normalises scores itself; "
            yield Problem("reward_norm", f"{message}set reward_norm: null (reward_norm=none)", ("adv_estimator",))

    def _keys_without_effect(self) -> Iterator[Problem]:
        """Yield keys that differ from their default but have no effect."""
        declarations = [functions.declaration(self.__dict__[key]) for key, functions in EXTENSIBLE.items()]
        read = {key for declared in declarations for key in declared.keys}
        for selector, functions in EXTENSIBLE.items():
            for key in functions.keys_read:
                if key not in read and not self.is_default(key):
                    readers = _alternatives(functions.readers(key))
                    message = f"is used only with {selector}: {readers}, not with {self.__dict__[selector]}"
                    yield Problem(key, f"{message}; change that, or remove this key", (selector,))
        dual_clip_reads_it = self.dual_clip_loss and self.dual_clip_ratio is None
        for key, reader, values, is_read in (
            ("pg_clip", "use_pg_clip_range", "false", not self.use_pg_clip_range or dual_clip_reads_it),
            ("overlong_penalty_factor", "overlong_buffer_length", "", self.overlong_buffer_length is not None),
            ("difficulty_low_threshold", "difficulty_mask", "true", self.difficulty_mask),
            ("difficulty_high_threshold", "difficulty_mask", "true", self.difficulty_mask),
            ("max_sampling_rounds", "query_filter_config.type", "std_filter or mean_filter", self.filters_groups),
            ("kl_loss_type", "use_kl_loss", "true", self.use_kl_loss),
            ("kl_penalty", "add_token_level_kl", "true", self.add_token_level_kl),
            ("kl_horizon", "target_kl", "", self.target_kl is not None),
        ):
            if not is_read and not self.is_default(key):
                yield used_only_with(key, reader, values)

    def _broken_clip_rules(self) -> Iterator[Problem]:
        bounds = {"pg_clip_low": self.pg_clip_low, "pg_clip_high": self.pg_clip_high}
        given = [key for key, value in bounds.items() if value is not None]
        if self.use_pg_clip_range and len(given) < 2:
            message = f"true, and importance_sampling: {self.importance_sampling} has no default range; set both bounds"
            yield Problem("use_pg_clip_range", message, tuple(bounds))
        for name in self.pg_clip_ranges:
            if name not in RATIOS and name != self.importance_sampling:
                hint = did_you_mean(name, list(RATIOS))
                yield Problem(f"pg_clip_ranges.{name}", f"is not an importance_sampling{hint}; rename or remove it")
        if not self.use_pg_clip_range and given:
            yield used_only_with(given[0], "use_pg_clip_range", "true")
        if self.pg_clip_length_scaling and self.importance_sampling not in ("seq", "seq_token"):
            message = f"needs one ratio per response, not importance_sampling: {self.importance_sampling}; set seq"
            yield Problem("pg_clip_length_scaling", message, ("importance_sampling",))
        if self.dual_clip_ratio is not None and not self.dual_clip_loss:
            yield used_only_with("dual_clip_ratio", "dual_clip_loss", "true")

    def _broken_reward_rules(self) -> Iterator[Problem]:
        if self.reward_shift and self.reward_scale:
            yield Problem(
                "reward_shift",
                "true and reward_scale: true exclude each other: the first only subtracts the mean, the second only "
                "divides by the standard deviation; set both false for (r - mean) / std",
                ("reward_scale",),
            )
        if self.reward_norm is None and (self.reward_shift or self.reward_scale):
            key = "reward_shift" if self.reward_shift else "reward_scale"
            yield Problem(key, "true needs reward_norm: group, batch or running; set one of them", ("reward_norm",))
        low, high = self.difficulty_low_threshold, self.difficulty_high_threshold
        if self.difficulty_mask and low >= high:
            message = f"{low:g} is not below difficulty_high_threshold {high:g}, so every group is masked; lower it"
            yield Problem("difficulty_low_threshold", message, ("difficulty_high_threshold",))

    def _broken_kl_rules(self) -> Iterator[Problem]:
        if self.use_kl_loss and self.kl_loss_coef == 0:
            message = "true needs kl_loss_coef above 0; set it, or use_kl_loss: false"
            yield Problem("use_kl_loss", message, ("kl_loss_coef",))
        if self.kl_loss_coef and not self.use_kl_loss:
            yield used_only_with("kl_loss_coef", "use_kl_loss", "true")
        if self.add_token_level_kl and self.init_kl_coef is None:
            yield Problem("add_token_level_kl", "true needs init_kl_coef; set it", ("init_kl_coef",))
        for key, value in (("init_kl_coef", self.init_kl_coef), ("target_kl", self.target_kl)):
            if value is not None and not self.add_token_level_kl:
                yield used_only_with(key, "add_token_level_kl", "true")

    def _broken_correction_rules(self) -> Iterator[Problem]:
        if self.top_entropy_quantile < 1 and not self.enable_old_logprobs_recompute:
            message = (
                f"{self.top_entropy_quantile:g} needs the entropies of the trainer, which only the recompute of old "
                "log-probs gives; set enable_old_logprobs_recompute: true (old_log_probs=recompute)"
            )
            yield Problem("top_entropy_quantile", message, ("enable_old_logprobs_recompute",))
        for key in ("train_infer_correction", "staleness_gate"):
            if self.__dict__[key] is not None and not self.enable_old_logprobs_recompute:
                yield Problem(
                    key,
                    "compares the trainer's old log-probs with the engine's, and with enable_old_logprobs_recompute: "
                    "false they are the same, so every weight is 1; set that switch to true "
                    f"(old_log_probs=recompute), or {key}: null",
                    ("enable_old_logprobs_recompute",),
                )
