"""Role blocks, named as in ROLL: `actor_train`, `actor_infer`, `reference`, `critic`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny

from roll_gspo.config.base import DeviceMapping, Problem, Schema, used_only_with
from roll_gspo.config.data import DataArgs
from roll_gspo.config.strategy import (
    GenerateStrategyArgs,
    ScoreStrategyArgs,
    StrategyArgs,
    TrainStrategyArgs,
    shipped_engines,
)

UnitInterval = Annotated[float, Field(ge=0, lt=1)]


class ModelArgs(Schema):
    """Which model a role holds."""

    model_name_or_path: str | None = None
    """Hugging Face name or folder; null: `pretrain`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of parameters and activations; CPU runs want `fp32`."""


class TrainingArgs(Schema):
    """Optimizer and mini-batches.

    A mini-batch, i.e. one optimizer step, has `per_device_train_batch_size * gradient_accumulation_steps`
    samples on every data-parallel rank.
    """

    learning_rate: PositiveFloat
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from its peak to `min_learning_rate` at the last step."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of a decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: UnitInterval = 0.0
    """Warm-up as a share of all optimizer steps; used where `warmup_steps` is 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: UnitInterval = 0.9
    """Decay of the first moment."""
    adam_beta2: UnitInterval = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    per_device_train_batch_size: PositiveInt = 1
    """Samples in one forward and backward pass (a micro-batch)."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step."""
    save_hf_model: bool = True
    """Beside each checkpoint, export the actor in Hugging Face layout."""

    @property
    def mini_batch_size_per_rank(self) -> int:
        """Samples that one rank contributes to an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def broken_rules(self) -> Iterator[Problem]:
        """Yield a schedule that rises at its end, and keys of a schedule that is not chosen."""
        yield from super().broken_rules()
        if self.min_learning_rate > self.learning_rate:
            peak, end = self.learning_rate, self.min_learning_rate
            message = f"{end:g} is above learning_rate {peak:g}; lower it"
            yield Problem("min_learning_rate", message, ("learning_rate",))
        if self.min_learning_rate and self.lr_scheduler_type == "constant":
            yield used_only_with("min_learning_rate", "lr_scheduler_type", "linear or cosine")
        if self.warmup_ratio and self.warmup_steps:
            yield used_only_with("warmup_ratio", "warmup_steps", "0")


class GeneratingArgs(Schema):
    """How responses are sampled."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy (validation only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this mass."""
    top_k: Annotated[int, Field(ge=-1)] = 0
    """Keep this many tokens; 0 or -1 keeps all."""
    max_new_tokens: PositiveInt | None = None
    """Limit of a response; null: `response_length`, and any other value than that is refused for training."""
    num_return_sequences: PositiveInt | None = None
    """Samples a prompt; null: the group size in training, 1 in validation."""


class RouterReplayConfig(Schema):
    """Which experts of a mixture of experts an update uses; without replay the router decides anew in every pass."""

    mode: Literal["disable", "R2", "R3"] = "disable"
    """`R2` replays the experts that the trainer chose for the old log-probs, `R3` those that vLLM chose while sampling;
    `disable`: none."""
    record: bool = False
    """Have vLLM tell the experts it chose, and log how many the trainer chooses otherwise (`routing/*`)."""

    @property
    def reads_rollout(self) -> bool:
        """Whether the experts that the generation engine chose are needed."""
        return self.record or self.mode == "R3"


class PolicyConfig(Schema):
    """The policy that is trained, whatever on."""

    training_args: TrainingArgs
    """Optimizer and mini-batches."""
    strategy_args: SerializeAsAny[TrainStrategyArgs]
    """Engine."""
    model_args: ModelArgs = ModelArgs()
    """Model."""
    device_mapping: DeviceMapping = None
    """Devices, one rank each; null: one rank on what this machine has."""
    infer_batch_size: PositiveInt = 16
    """Samples in one forward pass of the old log-probs."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens (padding included) in one forward pass, instead of `infer_batch_size` samples, if the engine
    supports it."""
    max_tokens_per_microbatch_in_train: PositiveInt | None = None
    """Dynamic batching: cut a mini-batch into micro-batches of at most this many tokens (padding included) instead of
    `per_device_train_batch_size` samples. Optimizer steps and results stay the same; a longer sample goes alone."""
    router_replay: RouterReplayConfig = RouterReplayConfig()
    """Replay of recorded experts; for mixtures of experts, if the engine supports it."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only one engine, or only some layouts, do."""
        yield from super().broken_rules()
        yield from _token_budget_rules(self)
        replay, args = self.router_replay, self.strategy_args
        if replay.mode == "disable" and not replay.record:
            return
        key, value = ("mode", replay.mode) if replay.mode != "disable" else ("record", "true")
        if not args.can_replay_routing:
            able = shipped_engines(TrainStrategyArgs, lambda engine: engine.can_replay_routing)
            yield _not_supported(f"router_replay.{key}", value, args, able, "set router_replay=none")
        elif conflicts := args.replay_conflicts:
            listed = ", ".join(f"{name.rpartition('.')[2]}: {text}" for name, text in conflicts.items())
            yield Problem(
                f"router_replay.{key}",
                f"{value} does not work with {listed}: recorded experts are not split by token or layer; remove these, "
                "or set router_replay=none",
                tuple(f"strategy_args.{name}" for name in conflicts),
            )


class ActorTrainConfig(PolicyConfig):
    """The policy that is trained."""

    data_args: DataArgs
    """Training prompts."""


class CriticConfig(Schema):
    """The model of values that `adv_estimator: gae` needs; built only there."""

    training_args: TrainingArgs
    """Optimizer and mini-batches."""
    strategy_args: SerializeAsAny[TrainStrategyArgs]
    """Engine."""
    model_args: ModelArgs = ModelArgs()
    """Model whose last layer becomes a value head."""
    device_mapping: DeviceMapping = None
    """Devices, one rank each; null: one rank on what this machine has."""
    infer_batch_size: PositiveInt = 16
    """Samples in one forward pass of the values."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens (padding included) in one forward pass, instead of `infer_batch_size` samples, if the engine
    supports it."""
    max_tokens_per_microbatch_in_train: PositiveInt | None = None
    """Dynamic batching: cut a mini-batch into micro-batches of at most this many tokens (padding included) instead of
    `per_device_train_batch_size` samples. Optimizer steps and results stay the same; a longer sample goes alone."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only one engine does."""
        yield from super().broken_rules()
        yield from _token_budget_rules(self)
        if not self.strategy_args.has_value_head:
            able = shipped_engines(TrainStrategyArgs, lambda engine: engine.has_value_head)
            yield Problem(
                "strategy_args.strategy_name",
                f"'{self.strategy_args.strategy_name}' has no value head; choose {' or '.join(able)}",
            )


class ActorInferConfig(Schema):
    """The policy that generates."""

    strategy_args: SerializeAsAny[GenerateStrategyArgs]
    """Engine."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling of training responses."""
    model_args: ModelArgs = ModelArgs()
    """Model."""
    device_mapping: DeviceMapping = None
    """Devices; null: one engine on what this machine has."""


class ReferenceConfig(Schema):
    """The frozen policy that KL terms are taken against; built only where one is switched on."""

    strategy_args: SerializeAsAny[ScoreStrategyArgs]
    """Engine."""
    model_args: ModelArgs = ModelArgs()
    """Model."""
    device_mapping: DeviceMapping = None
    """Devices; null: one rank on what this machine has."""
    infer_batch_size: PositiveInt = 16
    """Samples in one forward pass."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens (padding included) in one forward pass, instead of `infer_batch_size` samples, if the engine
    supports it."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only a generating engine does."""
        yield from super().broken_rules()
        yield from _token_budget_rules(self)
        for problem in self.strategy_args.scoring_problems():
            yield problem._replace(key=f"strategy_args.{problem.key}")


def _token_budget_rules(block: PolicyConfig | CriticConfig | ReferenceConfig) -> Iterator[Problem]:
    """Yield a token budget of forward passes with an engine that splits by samples only."""
    budget, args = block.max_tokens_per_microbatch_in_infer, block.strategy_args
    if budget is not None and not args.supports_token_budget:
        able = shipped_engines(StrategyArgs, lambda engine: engine.supports_token_budget)
        key = "max_tokens_per_microbatch_in_infer"
        yield _not_supported(key, str(budget), args, able, "remove it (infer_batch_size decides)")


def _not_supported(key: str, value: str, args: StrategyArgs, able: Iterable[str], fix: str) -> Problem:
    """Return the problem of a key that this engine does not support, with the shipped engines that do."""
    message = f"{value} is not supported by {args.strategy_name} (it is by {', '.join(able)}); {fix}"
    return Problem(key, message, ("strategy_args.strategy_name",))


Role = PolicyConfig | ActorInferConfig | ReferenceConfig | CriticConfig


class WarmStart(Schema):
    """Supervised start of a `builtin:` model on demonstrations of a task; cached in `output_dir`."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Demonstrations a step."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of AdamW, cosine decay."""
    demonstrations: Literal["builtin:column_addition", "builtin:multi_domain"] = "builtin:column_addition"
    """The task that is demonstrated."""
    slip_probability: UnitInterval = 0.25
    """Chance that the demonstrator errs, in a column or with the response to another prompt: what leaves reinforcement
    learning something to do."""
    seed: int = 0
    """Of weights and demonstrations; the same start serves every `seed` of a comparison."""


class CheckpointConfig(Schema):
    """How checkpoints are kept."""

    output_dir: str | None = None
    """Folder of the checkpoints; null: `checkpoints/` of the run."""
    max_ckpt_to_keep: NonNegativeInt = 2
    """Older ones are deleted, but for the best one; 0 keeps all."""
    keep_best: str | None = None
    """A figure of the validation, e.g. `validation/score_mean` or `validation/aime2024/avg@32`: a validation that is
    better than all before it is followed by a checkpoint, which stays until a better one is complete;
    `checkpoints/best.json` names it."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Which values of `keep_best` are better."""
    async_save: bool = False
    """Go on with the next step while a checkpoint is written; it counts once it is complete."""

    def broken_rules(self) -> Iterator[Problem]:
        """Only what validation measures tells a good policy."""
        yield from super().broken_rules()
        if self.keep_best is not None and not self.keep_best.startswith("validation/"):
            message = f"'{self.keep_best}' is no metric of the validation; give one, e.g. validation/score_mean"
            yield Problem("keep_best", message)
        if self.keep_best is None and self.keep_best_mode != "max":
            yield used_only_with("keep_best_mode", "keep_best")


class WeightTransferConfig(Schema):
    """How new weights travel from the trainer to the engines with `execution: ray`."""

    checksum: bool = False
    """Compare checksums of every bucket on arrival."""
    bucket_mb: PositiveInt = 16
    """Size of a bucket of tensors in MiB: what sender and receivers hold beside the model."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that one end waits for the other at any point."""
