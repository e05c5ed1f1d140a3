"""Reinforcement learning from verifiable rewards: the training loop.

sample prompts -> generate groups -> score (and replace groups that fail the filter) -> log-probs (reference, old),
values -> advantages -> critic and policy updates -> send weights to the generation engine -> validate, log, save

Before it calls a role, a step enters the phase in which that role is in the memory of the devices that roles share.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from roll_gspo.algorithms.policy_loss import has_gradient
from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.rlvr.build import RlvrComponents
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.experience import (
    TokenScoring,
    entropy_metrics,
    mismatch,
    ratio_mismatch,
    rollout_ess,
    rollout_metrics,
    routing_metrics,
    staleness,
    train_batch,
)
from roll_gspo.pipelines.rlvr.mismatch_gate import MismatchGate
from roll_gspo.pipelines.rlvr.models import CRITIC, REFERENCE
from roll_gspo.pipelines.rlvr.ratio_noise import RatioNoiseAlarm
from roll_gspo.pipelines.rlvr.transfer_check import check_transfer
from roll_gspo.pipelines.rlvr.validation import Answers, ScoredBatch, answers_of, summaries, validation_metrics
from roll_gspo.pipelines.settings import policy_loss_settings
from roll_gspo.pipelines.state import ACTOR
from roll_gspo.pipelines.step_loop import Steps
from roll_gspo.roles.shared_devices import Phase
from roll_gspo.strategies.base import TokenScores
from roll_gspo.tracking.console import Console

logger = logging.getLogger(__name__)
TRANSFER_CHECK_PROMPTS = 8


class RlvrSteps(Steps[ExperimentConfig, RlvrComponents]):
    """The steps of reinforcement learning from verifiable rewards."""

    _checked_transfer = False
    _version = 0
    """Version of the trainer's weights: the step of the last policy update, or the step that was resumed from."""

    def __init__(self, config: ExperimentConfig, components: RlvrComponents, console: Console) -> None:
        super().__init__(config, components, console)
        self._noise_alarm = RatioNoiseAlarm(config)
        self._mismatch_gate = MismatchGate(config)

    def prepare(self) -> None:
        """Send the initial weights to the generation engine."""
        self._version = self.components.state.step
        with self.console.stage("sync_weights"):
            self.components.weights.push(self._version)

    def train_step(self, step: int) -> dict[str, float]:
        """Generate, score and train on one rollout."""
        components, stage = self.components, self.console.stage
        self._enter_generating()
        collected = components.collector.collect(step, stage)
        rollouts = collected.rollouts
        metrics = collected.metrics | rollout_metrics(rollouts)
        scoring, figures = self._score_tokens(step, rollouts)
        with stage("advantages"):
            domains = components.rewards.domains(rollouts.prompts)
            batch, statistics = train_batch(collected, scoring, components.experience, components.state, domains)
        metrics |= figures | statistics
        with stage("log"):  # Write before the update: its error messages refer to samples in this file.
            scored = rollouts, domains, collected.results, batch
            components.samples.write_rollouts(step, *scored, self._version)
            if self._logs_samples(step):
                components.output.log_samples(step, components.samples.tracked(*scored))
        if components.critic is not None:
            components.devices.enter(Phase.TRAINING, CRITIC)
            with stage("update_critic") as progress:
                metrics |= components.critic.update(batch, step, progress)
        metrics |= self._update_policy(batch, step, metrics)
        # Asynchronous groups count the weights of every step, also of one without an update.
        if metrics["actor/num_updates"] or self.config.is_async:
            self._send_weights(step)
        if metrics["actor/num_updates"]:
            self._trace(step, collected)
        if not bool(collected.valid.any()):  # no mean over no scores
            metrics = {name: value for name, value in metrics.items() if not name.startswith("reward/score_")}
        metrics |= components.state.metrics() | components.devices.take_metrics()
        return metrics | {"data/prompts_dropped": float(components.num_prompts_dropped)}

    def _enter_generating(self) -> None:
        """Let the engines generate. Engines that have left shared devices since the last transfer need the weights."""
        devices = self.components.devices
        if devices.needs_weights:
            with self.console.stage("sync_weights"):
                devices.send_weights()
        devices.enter(Phase.GENERATING)

    def before_save(self, role: str) -> None:
        """Bring the state of a trained role onto its devices."""
        self.components.devices.enter(Phase.TRAINING, role)

    def _send_weights(self, step: int) -> None:
        """Send the trainer's weights to the engines. If the staleness gate waits, sample the groups in flight again."""
        components, stage = self.components, self.console.stage
        components.collector.wait_for_push(stage)
        self._version = step
        with stage("sync_weights"):
            components.weights.push(step)
        gate = components.state.staleness_gate
        if gate is not None and gate.wants_fresh:
            components.collector.refresh()

    def _logs_samples(self, step: int) -> bool:
        every = self.config.log_samples_every
        return every > 0 and step % every == 0

    def _trace(self, step: int, collected: Collected) -> None:
        """Score a few samples after the update. The report shows the ratio of each token."""
        rows = self.components.samples.traced(collected.rollouts, collected.results)
        if not len(rows):
            return
        with self.console.stage("trace"):
            self.components.devices.enter(Phase.SCORING)
            traced = collected.rollouts.sequences.rows(rows)
            log_probs = self.components.actor_train.score(traced).log_probs
            self.components.samples.write_updated(step, rows, log_probs, traced.response_mask)

    def _score_tokens(self, step: int, rollouts: Rollouts) -> tuple[TokenScoring, dict[str, float]]:
        """Score the sampled tokens with reference, critic and trainer before any update."""
        components, stage = self.components, self.console.stage
        ref_log_probs = values = None
        if components.reference is not None:
            components.devices.enter(Phase.SCORING, ACTOR if self.config.reference_is_base else REFERENCE)
            with stage("reference_log_probs"):
                ref_log_probs = components.reference.log_probs(rollouts.sequences)
        if components.critic is not None:
            components.devices.enter(Phase.SCORING, CRITIC)
            with stage("values"):
                values = components.critic.values(rollouts.sequences)
        buckets, lag_metrics = staleness(rollouts, self._version, self.config.async_generation_ratio)
        with stage("old_log_probs"):
            old_log_probs, own, metrics = self._old_log_probs(step, rollouts, buckets)
        routed_experts = rollouts.routed_experts
        if own is not None and self.config.actor_train.router_replay.mode != "R3":
            routed_experts = own.routed_experts
        entropy = None if own is None else own.entropy
        scoring = TokenScoring(old_log_probs, ref_log_probs, values, routed_experts, entropy, buckets)
        return scoring, metrics | lag_metrics

    def _old_log_probs(
        self, step: int, rollouts: Rollouts, buckets: torch.Tensor | None
    ) -> tuple[torch.Tensor, TokenScores | None, dict[str, float]]:
        """Return the old log-probs, the trainer's scores if they were computed, and metrics.

        The first rollout also checks that trainer and generation engine agree.
        """
        recompute = self.config.enable_old_logprobs_recompute
        if not recompute and self._checked_transfer:
            return rollouts.rollout_log_probs, None, {}
        self.components.devices.enter(Phase.SCORING)
        own = self.components.actor_train.score(rollouts.sequences)
        if not self._checked_transfer:
            self._check_transfer(step, rollouts, own.log_probs)
            self._checked_transfer = True
        if not recompute:  # The first mini-batch of every step measures the mismatch instead.
            return rollouts.rollout_log_probs, None, {}
        level = self.config.importance_level
        metrics = mismatch(rollouts, own.log_probs, buckets, level) | entropy_metrics(rollouts, own.entropy)
        metrics |= ratio_mismatch(rollouts, own.log_probs, buckets, policy_loss_settings(self.config))
        if self.config.staleness_gate is not None:
            metrics |= rollout_ess(rollouts, own.log_probs, level)
        return own.log_probs, own, metrics | routing_metrics(rollouts, own.routed_experts)

    def _check_transfer(self, step: int, rollouts: Rollouts, log_probs: torch.Tensor) -> None:
        """Check that trainer and engine agree on a rollout; on a few new responses if older weights sampled it."""
        components, sampling = self.components, self.components.sampling
        mask = rollouts.sequences.response_mask
        if bool((rollouts.versions[mask] != self._version).any()):
            prompts = list({id(prompt): prompt for prompt in rollouts.prompts}.values())[:TRANSFER_CHECK_PROMPTS]
            self._enter_generating()
            rollouts = components.actor_infer.generate(prompts, replace(sampling, num_samples=1), "transfer check")
            components.devices.enter(Phase.SCORING)
            log_probs = components.actor_train.score(rollouts.sequences).log_probs
        dtypes = (role.model_args.dtype for role in (self.config.actor_train, self.config.actor_infer))
        found = check_transfer(rollouts, log_probs, sampling, *dtypes)
        if found is not None:
            self._mismatch_gate.check(step, found)

    def _update_policy(self, batch: TrainBatch, step: int, so_far: Mapping[str, float]) -> dict[str, float]:
        """Update the actor. Warn if the update is skipped.

        `so_far` are the metrics of the step's rollout.
        """
        stage = self.console.stage
        if step <= self.config.critic_warmup:
            return {"actor/num_updates": 0.0, "actor/skipped_updates": 0.0}
        closed = self._checked_by_gate(step, so_far)
        gate = {} if self.config.staleness_gate is None else {"staleness/gate_closed": float(closed is not None)}
        reason = self._reason_to_skip(batch, so_far, closed)
        if reason is not None:
            logger.warning("step %d: %s; the update is skipped", step, reason)
            skipped = float(self.config.updates_per_rollout)
            return {"actor/num_updates": 0.0, "actor/skipped_updates": skipped, **gate}
        self.components.devices.enter(Phase.TRAINING)
        with stage("update") as progress:
            metrics = self.components.actor_train.update(batch, step, progress)
        return metrics | gate | self._noise_alarm.check(step, {**so_far, **metrics})

    def _checked_by_gate(self, step: int, so_far: Mapping[str, float]) -> str | None:
        """Return why the staleness gate is closed, or None. Warn if generation is to wait."""
        gate = self.components.state.staleness_gate
        closed = None if gate is None else gate.check(so_far["staleness/ess"])
        if gate is not None and gate.wants_fresh:
            logger.warning("step %d: %s; the next batch is generated with the newest weights", step, closed)
        if gate is not None and gate.action == "stop" and closed is not None:
            self.stop_reason = f"step {step}: {closed}"
        return closed

    def _reason_to_skip(self, batch: TrainBatch, so_far: Mapping[str, float], closed: str | None) -> str | None:
        """Return why the policy update is skipped, or None. `closed` is the reason of the staleness gate."""
        gate = self.config.staleness_gate
        if gate is not None and gate.action != "wait" and closed is not None:
            return closed
        if not bool(batch.response_mask.any()):
            return "every sample is masked (max_len_mask, difficulty_mask, failed rewards)"
        if not has_gradient(batch, policy_loss_settings(self.config)):
            lowest, highest = so_far["reward/score_min"], so_far["reward/score_max"]
            rewards = f" (every reward is {lowest:g})" if lowest == highest else ""
            return f"every advantage is 0{rewards} and there is no KL or entropy term"
        return None

    def validate(self, step: int) -> dict[str, float]:
        """Return validation metrics of the current policy. Samples are written batch by batch."""
        components, validation = self.components, self.components.validation
        if validation is None:
            return {}
        answers: list[Answers] = []
        self._enter_generating()

        def seen(batch: ScoredBatch) -> ScoredBatch:
            answers.extend(answers_of(batch, validation.config.group_by))
            return batch

        with self.console.stage("validate") as progress:
            batches = validation.scored(components.validation_generator, components.collector.score, progress)
            self.components.samples.write_validation(step, (seen(batch) for batch in batches))
        return validation_metrics(summaries(answers, validation.config))

    def throughput(self, metrics: Mapping[str, float], times: Mapping[str, float]) -> dict[str, float]:
        """Return the tokens per second of generation, or of the step if generation runs ahead."""
        seconds = times["time/step"] if self.config.is_async else times["time/generate"]
        return {"rollout/tokens_per_s": metrics["rollout/num_tokens"] / seconds}
