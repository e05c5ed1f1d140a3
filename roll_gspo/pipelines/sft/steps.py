"""The steps of supervised fine-tuning.

draw a mini-batch -> one optimizer step on the assistant's tokens -> validate, log, save
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from roll_gspo.batch import TrainBatch
from roll_gspo.config.sft import SftConfig
from roll_gspo.pipelines.sft.build import SftComponents, sequences_of
from roll_gspo.pipelines.step_loop import Steps


class SftSteps(Steps[SftConfig, SftComponents]):
    """The steps of supervised fine-tuning."""

    _num_tokens = 0  # tokens of the last mini-batch, prompts included

    def train_step(self, step: int) -> dict[str, float]:
        """Take one optimizer step on the next mini-batch."""
        components = self.components
        samples = components.state.sampler.next_batch(self.config.mini_batch_size)
        sequences, rows = sequences_of(samples, components.pad_token_id)
        self._num_tokens = int(sequences.lengths.sum())
        with self.console.stage("update") as progress:
            metrics = components.actor_train.update(TrainBatch.of_demonstrations(sequences, rows), step, progress)
        return metrics | components.state.metrics() | {"data/sequences_dropped": float(components.num_dropped)}

    def validate(self, step: int) -> dict[str, float]:
        """Return the loss on the held-out conversations."""
        components = self.components
        if not components.validation:
            return {}
        with self.console.stage("validate"):
            sequences, _ = sequences_of(components.validation, components.pad_token_id)
            total, num_tokens = components.actor_train.negative_log_likelihood(sequences)
        loss = total / num_tokens
        return {
            "validation/loss": loss,
            "validation/perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "validation/num_samples": float(len(components.validation)),
            "validation/num_tokens": float(num_tokens),
        }

    def throughput(self, metrics: Mapping[str, float], times: Mapping[str, float]) -> dict[str, float]:
        """Return the tokens trained per second of update, prompts included."""
        return {"sft/tokens_per_s": self._num_tokens / times["time/update"]}

    def finish(self, step: int) -> None:
        """Print the path of the exported model."""
        if (model := self.components.output.hf_model(step)) is not None:
            self.console.message(f"model: {model}; a run starts from it with pretrain={model}")
