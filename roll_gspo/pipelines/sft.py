"""Supervised fine-tuning on conversations: the training loop.

sample a mini-batch -> one optimizer step on the assistant's tokens -> validate, log, save
"""

from __future__ import annotations

import math

from roll_gspo.batch import TrainBatch
from roll_gspo.config.sft import SftConfig
from roll_gspo.pipelines.build_sft import SftComponents, build_sft_components, sequences_of
from roll_gspo.pipelines.interrupt import Interrupt, graceful_interrupt
from roll_gspo.pipelines.lifecycle import finish, open_console, run_with_restarts
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.run_folder import RunFolder
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.memory import rss_mb


def run(config: SftConfig, plan: Plan) -> int:
    """Run the whole training; returns the process's exit status.

    Raises:
        WorkerError: a worker process was lost more than `max_restarts` times.
    """
    return run_with_restarts(config, plan, _run_once)


def _run_once(config: SftConfig, folder: RunFolder) -> int:
    with open_console(config, folder, config.max_steps or 0, headline="sft/loss") as console:
        parts = build_sft_components(config, folder, console)
        try:
            with graceful_interrupt(console.warning) as interrupt:
                return Sft(config, parts, console, interrupt).train()
        finally:
            parts.output.close()
            parts.executor.close()


class Sft:
    """One run: its parts, its state, and the loop over steps."""

    def __init__(self, config: SftConfig, parts: SftComponents, console: Console, interrupt: Interrupt) -> None:
        self._config = config
        self._parts = parts
        self._console = console
        self._interrupt = interrupt
        self._first_step = parts.state.step + 1

    def train(self) -> int:
        """Every step that is left; a checkpoint follows the last one, or the one that Ctrl-C interrupted."""
        config, parts, state, output = self._config, self._parts, self._parts.state, self._parts.output
        keep = config.checkpoint_config
        if state.step == 0:
            output.before_training(self._validate())
        self._console.start_steps(self._first_step, parts.num_steps)
        stopping = self._interrupt.requested
        while state.step < parts.num_steps and not stopping:
            step = state.step + 1
            metrics, num_tokens = self._step(step)
            state.step = step
            last, best = step == parts.num_steps, False
            if last or step % config.eval_steps == 0:
                figures = self._validate()
                metrics |= figures
                best = state.take_if_best(keep.keep_best, keep.keep_best_mode, figures)
            # Logged before it is saved: a run killed in between is resumed from the checkpoint before, and the
            # line is written again.
            output.log(step, metrics | self._costs(num_tokens))
            stopping = self._interrupt.requested  # asked once: whoever stops has saved
            if last or stopping or best or step % config.save_steps == 0:
                with self._console.stage("save"):
                    output.save(step, parts.actor_train, None, state)
            else:
                output.finish_save(wait=False)
        with self._console.stage("save"):
            output.finish_save()
        return self._finish()

    def _step(self, step: int) -> tuple[dict[str, float], int]:
        """Metrics, and the tokens that went through the model."""
        parts = self._parts
        samples = parts.state.sampler.next_batch(self._config.mini_batch_size)
        sequences, rows = sequences_of(samples, parts.pad_token_id)
        with self._console.stage("update") as progress:
            metrics = parts.actor_train.update(TrainBatch.of_demonstrations(sequences, rows), step, progress)
        metrics |= parts.state.metrics() | {"data/sequences_dropped": float(parts.num_dropped)}
        return metrics, int(sequences.lengths.sum())

    def _validate(self) -> dict[str, float]:
        parts = self._parts
        if not parts.validation:
            return {}
        with self._console.stage("validate"):
            sequences, _ = sequences_of(parts.validation, parts.pad_token_id)
            total, num_tokens = parts.actor_train.negative_log_likelihood(sequences)
        loss = total / num_tokens
        return {
            "validation/loss": loss,
            "validation/perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "validation/num_samples": float(len(parts.validation)),
            "validation/num_tokens": float(num_tokens),
        }

    def _costs(self, num_tokens: int) -> dict[str, float]:
        """Time and memory of the step that ends here."""
        times = self._console.timings()
        return {**times, "sft/tokens_per_s": num_tokens / times["time/update"], "memory/rss_mb": rss_mb()}

    def _finish(self) -> int:
        parts, step = self._parts, self._parts.state.step
        if step >= self._first_step and (model := parts.output.hf_model(step)) is not None:
            self._console.message(f"model: {model}; a run starts from it with pretrain={model} warm_start=null")
        return finish(parts.output, self._console, self._interrupt, self._first_step, step, parts.num_steps)
