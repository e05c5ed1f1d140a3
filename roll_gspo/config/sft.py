"""The root of the configuration with `pipeline: sft`: what it shares with `rlvr`, and keys of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from roll_gspo.config.base import Problem, Schema
from roll_gspo.config.data import SourceArgs
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.ranks import broken_dtype_rules, broken_rank_rules, model_parallel_size, num_ranks
from roll_gspo.config.roles import PolicyConfig, RouterReplayConfig
from roll_gspo.config.run import RunConfig

# Keys that the two pipelines share by their class, and that only generation engines read.
OF_GENERATION = ("max_worker_restarts", "weight_transfer")
# Metrics of the validation by which the best checkpoint can be chosen; lower is better.
METRICS = ("validation/loss", "validation/perplexity")


class SftDataArgs(SourceArgs):
    """Where conversations come from."""

    multi_turn: Literal["joint", "separate"] = "joint"
    """A conversation with several assistant's turns is one sequence in which all of them are imitated (`joint`), or one
    for each turn with all that comes before it (`separate`): for chat templates that render earlier turns otherwise
    than the last, such as those that leave out its thinking."""


class SftTrainConfig(PolicyConfig):
    """The model that is trained."""

    data_args: SftDataArgs
    """Training conversations."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only rollouts have."""
        yield from super().broken_rules()
        if self.router_replay != RouterReplayConfig():
            message = "replays the experts of a rollout, and pipeline: sft has no rollouts; remove it"
            yield Problem("router_replay", message)


class SftValidationConfig(Schema):
    """Held-out conversations, scored before the first step, every `eval_steps`, and after the last."""

    data_args: SftDataArgs
    """Validation conversations."""


class SftConfig(RunConfig):
    """Everything one YAML file may say with `pipeline: sft`."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the whole run; null: as many as `num_epochs` takes. With both, whichever is over first."""
    num_epochs: PositiveInt | None = None
    """Passes over the training data; the last mini-batch is filled up from the next pass."""
    sequence_length: PositiveInt = 2048
    """Longest conversation in tokens; longer ones are dropped and counted, never cut."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the gradient to this norm."""
    max_consecutive_skipped_steps: PositiveInt = 3
    """Stop after this many optimizer steps in a row that were skipped as not finite."""
    actor_train: SftTrainConfig
    """The model that is trained."""
    validation: SftValidationConfig | None = None
    """Held-out conversations."""

    @property
    def data_parallel_size(self) -> int:
        """Copies of the trained model."""
        return num_ranks(self.actor_train) // model_parallel_size(self.actor_train)

    @property
    def mini_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.actor_train.training_args.mini_batch_size_per_rank * self.data_parallel_size

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run on a training set of `num_samples`."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.num_epochs is not None:
            limits.append(-(-num_samples * self.num_epochs // self.mini_batch_size))
        return min(limits)

    def broken_rules(self) -> Iterator[Problem]:
        """The rules that span blocks."""
        yield from super().broken_rules()
        yield from broken_rank_rules("actor_train", self.actor_train)
        yield from broken_dtype_rules("actor_train", self.actor_train)
        if self.max_steps is None and self.num_epochs is None:
            yield Problem("num_epochs", "missing; add it, or max_steps", ("max_steps",))
        for key in OF_GENERATION:
            if self.__dict__[key] != RunConfig.model_fields[key].default:
                message = "is used only by generation engines, and pipeline: sft has none; remove it"
                yield Problem(key, message)
        yield from self._broken_template_rules()
        yield from self._broken_best_rules()

    def _broken_template_rules(self) -> Iterator[Problem]:
        """Where a turn has no mark, its tokens cannot be told from those before it, and the model learns no end."""
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
CONFIGS: dict[str, type[ExperimentConfig] | type[SftConfig]] = {"rlvr": ExperimentConfig, "sft": SftConfig}


def config_class(values: dict[str, Any]) -> type[ExperimentConfig] | type[SftConfig]:
    """The schema of composed YAML, by its `pipeline`; an unknown one is left to the schema of the default."""
    name = values.get("pipeline", "rlvr")
    return CONFIGS[name] if isinstance(name, str) and name in CONFIGS else ExperimentConfig
