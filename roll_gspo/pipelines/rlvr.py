"""Reinforcement learning from verifiable rewards: the training loop.

sample prompts -> generate groups -> score (and replace groups that teach nothing) -> log-probs (reference, old),
values -> advantages -> critic and policy updates -> hand the weights to the generation engine -> validate, log, save
"""

from __future__ import annotations

import logging

import torch

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.build import Components, build_components
from roll_gspo.pipelines.collect import Collected
from roll_gspo.pipelines.experience import (
    TokenScoring,
    entropy_metrics,
    mismatch,
    rollout_metrics,
    routing_metrics,
    train_batch,
)
from roll_gspo.pipelines.interrupt import Interrupt, graceful_interrupt
from roll_gspo.pipelines.lifecycle import finish, open_console, run_with_restarts
from roll_gspo.pipelines.output import Output, traced_samples
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.run_folder import RunFolder
from roll_gspo.pipelines.state import TrainerState
from roll_gspo.pipelines.transfer_check import check_transfer
from roll_gspo.pipelines.validation import Answers, ScoredBatch, answers_of, summaries, validation_metrics
from roll_gspo.strategies.base import TokenScores
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.memory import rss_mb

logger = logging.getLogger(__name__)


def run(config: ExperimentConfig, plan: Plan) -> int:
    """Run the whole training; returns the process's exit status.

    Raises:
        WorkerError: a worker process was lost more than `max_restarts` times.
    """
    return run_with_restarts(config, plan, _run_once)


def _run_once(config: ExperimentConfig, folder: RunFolder) -> int:
    with open_console(config, folder, config.max_steps) as console:
        parts = build_components(config, folder, console)
        try:
            with graceful_interrupt(console.warning) as interrupt:
                return Rlvr(config, parts, console, interrupt).train()
        finally:
            parts.output.close()
            parts.executor.close()


class Rlvr:
    """One run: its parts, its state, and the loop over steps."""

    def __init__(self, config: ExperimentConfig, parts: Components, console: Console, interrupt: Interrupt) -> None:
        self._config = config
        self._parts = parts
        self._console = console
        self._interrupt = interrupt
        self._state: TrainerState = parts.state
        self._output: Output = parts.output
        self._first_step = parts.state.step + 1
        self._checked_transfer = False

    def train(self) -> int:
        """Every step that is left; a checkpoint follows the last one, or the one that Ctrl-C interrupted."""
        config, state, keep = self._config, self._state, self._config.checkpoint_config
        with self._console.stage("sync_weights"):
            self._parts.weights.push(state.step)
        if state.step == 0:
            self._output.before_training(self._validate(0))
        self._console.start_steps(self._first_step)
        stopping = self._interrupt.requested
        while state.step < config.max_steps and not stopping:
            step = state.step + 1
            metrics = self._step(step)
            state.step = step
            last, best = step == config.max_steps, False
            if last or step % config.eval_steps == 0:
                figures = self._validate(step)
                metrics |= figures
                best = state.take_if_best(keep.keep_best, keep.keep_best_mode, figures)
            # Logged before it is saved: a run killed in between is resumed from the checkpoint before, and the
            # line is written again.
            self._output.log(step, metrics | self._costs(metrics["rollout/num_tokens"]))
            stopping = self._interrupt.requested  # asked once: whoever stops has saved
            if last or stopping or best or step % config.save_steps == 0:
                with self._console.stage("save"):
                    self._output.save(step, self._parts.actor_train, self._parts.critic, state)
            else:
                self._output.finish_save(wait=False)
        with self._console.stage("save"):
            self._output.finish_save()
        return finish(self._output, self._console, self._interrupt, self._first_step, state.step, config.max_steps)

    def _step(self, step: int) -> dict[str, float]:
        parts, stage = self._parts, self._console.stage
        collected = parts.collector.collect(step, stage)
        rollouts = collected.rollouts
        metrics = collected.metrics | rollout_metrics(rollouts)
        scoring, figures = self._score_tokens(rollouts)
        with stage("advantages"):
            batch, statistics = train_batch(collected, scoring, parts.experience, parts.state)
        metrics |= figures | statistics
        with stage("log"):  # before the update, which may fail and names samples of this file
            domains = parts.rewards.domains(rollouts.prompts)
            self._output.write_rollouts(step, rollouts, domains, collected.results, batch)
        if parts.critic is not None:
            with stage("update_critic") as progress:
                metrics |= parts.critic.update(batch, step, progress)
        metrics |= self._update_policy(batch, step, metrics["reward/score_min"], metrics["reward/score_max"])
        if metrics["actor/num_updates"] and self._config.trace_groups:
            with stage("trace"):
                self._trace(step, collected)
        return metrics | parts.state.metrics() | {"data/prompts_dropped": float(parts.num_prompts_dropped)}

    def _trace(self, step: int, collected: Collected) -> None:
        """Score a few samples again, for the ratio of each token that the report shows."""
        rows = traced_samples(collected.rollouts, collected.results, self._config.trace_groups)
        traced = collected.rollouts.sequences.rows(rows)
        log_probs = self._parts.actor_train.score(traced).log_probs
        self._output.write_updated(step, rows, log_probs, traced.response_mask)

    def _score_tokens(self, rollouts: Rollouts) -> tuple[TokenScoring, dict[str, float]]:
        """What reference, critic and trainer say of the sampled tokens, before any update."""
        parts, stage = self._parts, self._console.stage
        ref_log_probs = values = None
        if parts.reference is not None:
            with stage("reference_log_probs"):
                ref_log_probs = parts.reference.log_probs(rollouts.sequences)
        if parts.critic is not None:
            with stage("values"):
                values = parts.critic.values(rollouts.sequences)
        with stage("old_log_probs"):
            old_log_probs, own, metrics = self._old_log_probs(rollouts)
        routed_experts = rollouts.routed_experts
        if own is not None and self._config.actor_train.router_replay.mode != "R3":
            routed_experts = own.routed_experts
        return TokenScoring(old_log_probs, ref_log_probs, values, routed_experts), metrics

    def _old_log_probs(self, rollouts: Rollouts) -> tuple[torch.Tensor, TokenScores | None, dict[str, float]]:
        """Of the policy that the ratio is taken against, and all that the trainer said if it was asked.

        The first rollout also shows whether the engines agree.
        """
        recompute = self._config.enable_old_logprobs_recompute
        if not recompute and self._checked_transfer:
            return rollouts.rollout_log_probs, None, {}
        own = self._parts.actor_train.score(rollouts.sequences)
        if not self._checked_transfer:
            dtypes = (role.model_args.dtype for role in (self._config.actor_train, self._config.actor_infer))
            check_transfer(rollouts, own.log_probs, self._parts.sampling, *dtypes)
            self._checked_transfer = True
        if not recompute:  # then the first mini-batch of every step measures the mismatch
            return rollouts.rollout_log_probs, None, {}
        metrics = mismatch(rollouts, own.log_probs) | entropy_metrics(rollouts, own.entropy)
        return own.log_probs, own, metrics | routing_metrics(rollouts, own.routed_experts)

    def _update_policy(self, batch: TrainBatch, step: int, lowest: float, highest: float) -> dict[str, float]:
        """Train the actor and hand on its weights, or say why there is nothing to learn from.

        `lowest` and `highest` are the scores of the rollout's worst and best samples.
        """
        stage = self._console.stage
        if step <= self._config.critic_warmup:
            return {"actor/num_updates": 0.0, "actor/skipped_updates": 0.0}
        reason = None
        if not bool(batch.response_mask.any()):
            reason = "every sample is masked (max_len_mask, difficulty_mask, failed rewards); the update is skipped"
        elif lowest == highest:
            reason = f"every reward is {lowest:g}; nothing to learn from, the update is skipped"
        if reason is not None:
            logger.warning("step %d: %s", step, reason)
            return {"actor/num_updates": 0.0, "actor/skipped_updates": float(self._config.updates_per_rollout)}
        with stage("update") as progress:
            metrics = self._parts.actor_train.update(batch, step, progress)
        with stage("sync_weights"):
            self._parts.weights.push(step)
        return metrics

    def _validate(self, step: int) -> dict[str, float]:
        """Figures of the current policy on the held-out prompts, whose samples are written as they come."""
        parts, validation = self._parts, self._parts.validation
        if validation is None:
            return {}
        answers: list[Answers] = []

        def seen(batch: ScoredBatch) -> ScoredBatch:
            answers.extend(answers_of(batch, validation.config.group_by))
            return batch

        with self._console.stage("validate") as progress:
            batches = validation.judged(parts.actor_infer, parts.collector.judge, progress)
            self._output.write_validation(step, (seen(batch) for batch in batches))
        return validation_metrics(summaries(answers, validation.config))

    def _costs(self, num_tokens: float) -> dict[str, float]:
        """Time and memory of the step that ends here."""
        times = self._console.timings()
        return {
            **times,
            "rollout/tokens_per_s": num_tokens / times["time/generate"],
            "memory/rss_mb": rss_mb(),
        }
