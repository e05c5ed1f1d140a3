"""The algorithm's own keys, flat at the top level of the YAML, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from roll_gspo.config.base import Schema

AdvEstimator = Literal["reinforce", "grpo", "dr_grpo", "rloo"]
ImportanceSampling = Literal["token", "seq", "seq_token"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlEstimator = Literal["kl", "abs", "mse", "k3"]
ClipFraction = Annotated[float, Field(gt=0, lt=1)]


class AlgorithmConfig(Schema):
    """What is optimised, exactly; `docs/algorithms.md` has the formulas."""

    adv_estimator: AdvEstimator = "reinforce"
    """How rewards become advantages: `reinforce` (reward-to-go), `grpo` (normalised by the group), `dr_grpo` (minus the
    group's mean), `rloo` (minus the mean of the others of the group)."""
    importance_sampling: ImportanceSampling = "token"
    """Level of the importance ratio: `token` (PPO, GRPO), `seq` (GSPO), `seq_token` (GSPO-token)."""
    loss_agg_mode: LossAggMode = "seq-mean-token-mean"
    """How token losses become one number, with denominators over the whole mini-batch."""
    ppo_epochs: PositiveInt = 1
    """Passes over a rollout."""

    pg_clip: ClipFraction = 0.2
    """Symmetric clip range of the ratio, used unless `use_pg_clip_range`."""
    use_pg_clip_range: bool = False
    """Clip to [1 - pg_clip_low, 1 + pg_clip_high] instead of 1 ± pg_clip."""
    pg_clip_low: ClipFraction | None = None
    """Lower clip range; acts with `use_pg_clip_range` only."""
    pg_clip_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip range; acts with `use_pg_clip_range` only."""
    dual_clip_loss: bool = False
    """Bound the loss of samples with negative advantage by `dual_clip_ratio` times the advantage."""
    dual_clip_ratio: Annotated[float, Field(gt=1)] | None = None
    """Constant of the dual clip; null: 1 + 2 * pg_clip."""

    reward_norm: Literal["group", "batch", "running"] | None = None
    """Normalise scores over their group, the batch or all of the run; null: not at all."""
    reward_shift: bool = False
    """With `reward_norm`: subtract the mean only."""
    reward_scale: bool = False
    """With `reward_norm`: divide by the standard deviation only."""
    reward_clip: PositiveFloat | None = None
    """Clamp rewards to ± this, after normalisation."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of the reward-to-go."""
    whiten_advantages: bool = False
    """Zero mean and unit variance of advantages over all valid tokens of the batch."""
    advantage_clip: PositiveFloat | None = None
    """Clamp advantages to ± this."""

    use_kl_loss: bool = False
    """Add `kl_loss_coef` times the divergence from the reference model to the loss."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the KL loss."""
    kl_loss_type: KlEstimator = "k3"
    """Estimator of the KL loss."""
    add_token_level_kl: bool = False
    """Subtract beta times the divergence from the reference model from the reward of every token."""
    init_kl_coef: PositiveFloat | None = None
    """beta at the start; acts with `add_token_level_kl` only."""
    target_kl: PositiveFloat | None = None
    """Adapt beta towards this divergence; null keeps it fixed."""
    kl_horizon: PositiveInt = 10000
    """How slowly an adaptive beta moves, in samples."""
    kl_penalty: KlEstimator = "kl"
    """Estimator of the token-level KL."""
    entropy_loss_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    enable_old_logprobs_recompute: bool = True
    """Old log-probs from the trainer before its first update; false: the generation engine's own."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the gradient to this norm."""
    max_consecutive_skipped_steps: PositiveInt = 3
    """Stop after this many optimizer steps in a row that were skipped as not finite."""

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) around 1 that the ratio is clipped to."""
        if self.use_pg_clip_range:
            assert self.pg_clip_low is not None and self.pg_clip_high is not None  # held by the rules below
            return self.pg_clip_low, self.pg_clip_high
        return self.pg_clip, self.pg_clip

    @property
    def effective_dual_clip_ratio(self) -> float | None:
        """Constant of the dual clip, or None where it is off."""
        if not self.dual_clip_loss:
            return None
        return self.dual_clip_ratio or 1 + 2 * self.pg_clip

    @property
    def needs_reference(self) -> bool:
        """Whether any quantity of the loss or the reward reads reference log-probs."""
        return self.use_kl_loss or self.add_token_level_kl

    def broken_rules(self) -> Iterator[str]:
        """Flags without their keys, keys without their flags, and flags against each other."""
        yield from super().broken_rules()
        yield from self._broken_clip_rules()
        yield from self._broken_reward_rules()
        yield from self._broken_kl_rules()
        yield from self._keys_without_effect()

    def _keys_without_effect(self) -> Iterator[str]:
        """A key that is changed from its default where nothing reads it would be ignored silently."""
        dual_clip_reads_it = self.dual_clip_loss and self.dual_clip_ratio is None
        for key, reader, is_read in (
            ("gamma", "adv_estimator: reinforce", self.adv_estimator == "reinforce"),
            ("pg_clip", "use_pg_clip_range: false", not self.use_pg_clip_range or dual_clip_reads_it),
            ("kl_loss_type", "use_kl_loss: true", self.use_kl_loss),
            ("kl_penalty", "add_token_level_kl: true", self.add_token_level_kl),
            ("kl_horizon", "target_kl", self.target_kl is not None),
        ):
            if not is_read and self.__dict__[key] != type(self).model_fields[key].default:
                yield f"{key} acts with {reader} only; set that or remove it"

    def _broken_clip_rules(self) -> Iterator[str]:
        given = [self.pg_clip_low is not None, self.pg_clip_high is not None]
        if self.use_pg_clip_range and not all(given):
            yield "use_pg_clip_range: true needs both pg_clip_low and pg_clip_high; set them"
        if not self.use_pg_clip_range and any(given):
            key = "pg_clip_low" if given[0] else "pg_clip_high"
            yield f"{key} acts with use_pg_clip_range: true only; set that flag or remove it"
        if self.dual_clip_ratio is not None and not self.dual_clip_loss:
            yield "dual_clip_ratio acts with dual_clip_loss: true only; set that flag or remove it"

    def _broken_reward_rules(self) -> Iterator[str]:
        if self.reward_shift and self.reward_scale:
            yield (
                "reward_shift and reward_scale are both true: they mean 'only subtract the mean' and 'only "
                "divide by the deviation'; set both false for (r - mean) / std"
            )
        if self.reward_norm is None and (self.reward_shift or self.reward_scale):
            flag = "reward_shift" if self.reward_shift else "reward_scale"
            yield f"{flag}: true needs reward_norm: group, batch or running; set one of them"

    def _broken_kl_rules(self) -> Iterator[str]:
        if self.use_kl_loss and self.kl_loss_coef == 0:
            yield "use_kl_loss: true needs kl_loss_coef above 0; set it, or use_kl_loss: false"
        if self.kl_loss_coef and not self.use_kl_loss:
            yield "kl_loss_coef acts with use_kl_loss: true only; set that flag or remove it"
        if self.add_token_level_kl and self.init_kl_coef is None:
            yield "add_token_level_kl: true needs init_kl_coef; set it"
        for key, value in (("init_kl_coef", self.init_kl_coef), ("target_kl", self.target_kl)):
            if value is not None and not self.add_token_level_kl:
                yield f"{key} acts with add_token_level_kl: true only; set that flag or remove it"
