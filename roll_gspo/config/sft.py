"""The root of the configuration with `pipeline: sft`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from roll_gspo.config.base import Problem, Schema
from roll_gspo.config.data import SourceArgs
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.ranks import broken_dtype_rules, broken_rank_rules, data_parallel_size
from roll_gspo.config.roles import PolicyConfig, Role, RouterReplayConfig
from roll_gspo.config.run import RunConfig

# Keys of `RunConfig` that only generation engines read.
GENERATION_KEYS = ("max_worker_restarts", "weight_transfer")
# Validation metrics that can select the best checkpoint; lower is better.
METRICS = ("validation/loss", "validation/perplexity")


class SftDataArgs(SourceArgs):
    """Data files of conversations."""

    multi_turn: Literal["joint", "separate"] = "joint"
    """`joint` makes one sequence of a conversation and imitates all assistant turns. `separate` makes one sequence per
    assistant turn, with all earlier turns as its prompt. Use it for chat templates that render earlier turns
    differently from the last, e.g. without thinking."""


class SftTrainConfig(PolicyConfig):
    """The model that is trained."""

    data_args: SftDataArgs
    """Training conversations."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield router replay and a transfer of adapters, which need rollouts."""
        yield from super().broken_rules()
        if self.router_replay != RouterReplayConfig():
            message = "replays the experts of a rollout, and pipeline: sft has no rollouts; remove it"
            yield Problem("router_replay", message)
        lora = self.model_args.lora
        if lora is not None and lora.sync is not None:
            message = f"{lora.sync} is for generation engines, and pipeline: sft has none; remove it"
            yield Problem("model_args.lora.sync", message)


class SftValidationConfig(Schema):
    """Held-out conversations, scored before the first step, every `eval_steps` and after the last step."""

    data_args: SftDataArgs
    """Validation conversations."""


class SftConfig(RunConfig):
    """All keys of `pipeline: sft`."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the whole run; null: given by `num_epochs`. If both are set, the smaller limit applies."""
    num_epochs: PositiveInt | None = None
    """Passes over the training data; the last mini-batch is filled from the next pass."""
    sequence_length: PositiveInt = 2048
    """Longest conversation in tokens; longer ones are dropped and counted, never truncated."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the gradient to this norm."""
    max_consecutive_skipped_steps: PositiveInt = 3
    """Stop after this many consecutive optimizer steps that were skipped as not finite."""
    actor_train: SftTrainConfig
    """The model that is trained."""
    validation: SftValidationConfig | None = None
    """Held-out conversations."""

    def roles(self) -> dict[str, Role]:
        """Return the roles that are built and hold a model, by name."""
        return {"actor_train": self.actor_train}

    @property
    def scoring_temperature(self) -> float:
        """Temperature of all log-probs: nothing is sampled."""
        return 1.0

    @property
    def data_parallel_size(self) -> int:
        """Number of copies of the trained model."""
        return data_parallel_size(self.actor_train)

    @property
    def mini_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.actor_train.training_args.mini_batch_size_per_rank * self.data_parallel_size

    def num_steps(self, num_samples: int) -> int:
        """Return the optimizer steps of the whole run on `num_samples` training samples."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.num_epochs is not None:
            limits.append(-(-num_samples * self.num_epochs // self.mini_batch_size))
        return min(limits)

    def broken_rules(self) -> Iterator[Problem]:
        """Yield broken rules between blocks."""
        yield from super().broken_rules()
        yield from broken_rank_rules("actor_train", self.actor_train)
        yield from broken_dtype_rules("actor_train", self.actor_train)
        if self.max_steps is None and self.num_epochs is None:
            yield Problem("num_epochs", "missing; add it, or max_steps", ("max_steps",))
        for key in GENERATION_KEYS:
            if self.__dict__[key] != RunConfig.model_fields[key].default:
                message = "is used only by generation engines, and pipeline: sft has none; remove it"
                yield Problem(key, message)
        yield from self._broken_template_rules()
        yield from self._broken_best_rules()

    def _broken_template_rules(self) -> Iterator[Problem]:
        """Yield templates that do not mark turns, so that the assistant's tokens cannot be found."""
        named = {"actor_train.data_args.template": self.actor_train.data_args.template}
        if self.validation is not None:
            named["validation.data_args.template"] = self.validation.data_args.template
        named["global_template"] = self.global_template
        named |= {f"tag_to_template.{tag}": name for tag, name in self.tag_to_template.items()}
        for key, name in named.items():
            if name == "plain":
                yield Problem(
                    key,
                    "plain marks neither turns nor their end, so pipeline: sft cannot find the tokens to imitate; "
                    "choose a template that does, e.g. chatml",
                )

    def _broken_best_rules(self) -> Iterator[Problem]:
        keep, key = self.checkpoint_config, "checkpoint_config.keep_best"
        if keep.keep_best is None:
            return
        if self.validation is None:
            message = f"{keep.keep_best} needs the validation block; add it, or remove the key"
            yield Problem(key, message, ("validation",))
        if keep.keep_best not in METRICS:
            message = f"{keep.keep_best} is no metric of pipeline: sft; choose one of {', '.join(METRICS)}"
            yield Problem(key, message)
        elif keep.keep_best_mode != "min":
            message = f"{keep.keep_best_mode} would keep the worst {keep.keep_best}; set min"
            yield Problem(f"{key}_mode", message, (key,))


AnyConfig = ExperimentConfig | SftConfig
