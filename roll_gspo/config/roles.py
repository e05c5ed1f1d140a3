"""Role blocks, named as in ROLL: `actor_train`, `actor_infer`, `reference`, `critic`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny

from roll_gspo.config.base import DeviceMapping, Problem, Schema, used_only_with
from roll_gspo.config.data import DataArgs
from roll_gspo.config.lora import LoraArgs, broken_engine_rules, not_trained
from roll_gspo.config.strategy import (
    GenerateStrategyArgs,
    ScoreStrategyArgs,
    StrategyArgs,
    TrainStrategyArgs,
    shipped_engines,
)

# Tokens of one pass on a GPU, if samples are packed and no budget is set. Passes without gradient keep no activations.
TOKENS_PER_PASS_IN_TRAIN, TOKENS_PER_PASS_IN_INFER = 16_384, 32_768

BuiltinTask = Literal["builtin:column_addition", "builtin:multi_domain"]
UnitInterval = Annotated[float, Field(ge=0, lt=1)]


class ModelArgs(Schema):
    """Model of a role."""

    model_name_or_path: str | None = None
    """Hugging Face name or local folder; null: `pretrain`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of parameters and activations. Use `fp32` on CPUs."""
    lora: LoraArgs | None = None
    """Train a low-rank adapter of the frozen model instead of all weights; `actor_train` only. Needs `peft`."""


class TrainingArgs(Schema):
    """Optimizer and mini-batches.

    A mini-batch, i.e. one optimizer step, has `per_device_train_batch_size * gradient_accumulation_steps`
    samples on every data-parallel rank.
    """

    learning_rate: PositiveFloat
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate from its peak to `min_learning_rate` at the last step."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of a decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: UnitInterval = 0.0
    """Warm-up as a share of all optimizer steps. Used if `warmup_steps` is 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: UnitInterval = 0.9
    """Decay of the first moment."""
    adam_beta2: UnitInterval = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Constant that is added to the square root of the second moment."""
    per_device_train_batch_size: PositiveInt = 1
    """Samples in one forward and backward pass (a micro-batch)."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step."""
    save_hf_model: bool = True
    """Export the actor in Hugging Face layout beside each checkpoint."""

    @property
    def mini_batch_size_per_rank(self) -> int:
        """Samples per rank and optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def broken_rules(self) -> Iterator[Problem]:
        """Yield an end learning rate above the peak, and keys that the chosen schedule does not use."""
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
    """Sampling parameters of responses."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy (validation only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of nucleus sampling: keep the smallest set of tokens that reaches it."""
    top_k: Annotated[int, Field(ge=-1)] = 0
    """Number of most likely tokens to keep; 0 or -1 keeps all."""
    max_new_tokens: PositiveInt | None = None
    """Maximum tokens per response; null: `response_length`. Training accepts no other value."""
    num_return_sequences: PositiveInt | None = None
    """Samples per prompt; null: the group size in training, 1 in validation."""


class RouterReplayConfig(Schema):
    """Experts that an update of a mixture of experts uses. Without replay, the router chooses them in every pass."""

    mode: Literal["disable", "R2", "R3"] = "disable"
    """`R2` replays the experts that the trainer chose for the old log-probs. `R3` replays those that vLLM chose while
    sampling. `disable` replays none."""
    record: bool = False
    """Record the experts that vLLM chose, and log how often the trainer chooses others (`routing/*`)."""

    @property
    def reads_rollout(self) -> bool:
        """True if the experts that the generation engine chose are needed."""
        return self.record or self.mode == "R3"


class TrainedRoleConfig(Schema):
    """A role whose engine trains a model: the policy or the critic."""

    training_args: TrainingArgs
    """Optimizer and mini-batches."""
    strategy_args: SerializeAsAny[TrainStrategyArgs]
    """Engine and its options."""
    model_args: ModelArgs = ModelArgs()
    """Model. A critic replaces its output layer by a value head."""
    device_mapping: DeviceMapping = None
    """Devices, one rank each; null: one rank on the first device. Roles may share devices (`offload_states`)."""
    infer_batch_size: PositiveInt = 16
    """Samples in one forward pass without gradient, of old log-probs or values."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens (padding included) in one forward pass, instead of `infer_batch_size` samples, if the engine supports it.
    null: 32768 on GPUs if the engine packs samples, else `infer_batch_size` decides."""
    max_tokens_per_microbatch_in_train: PositiveInt | None = None
    """Dynamic batching: cut a mini-batch into micro-batches of at most this many tokens (padding included) instead of
    `per_device_train_batch_size` samples. Optimizer steps and results do not change. A sample that exceeds the limit
    forms its own micro-batch. null: 16384 on GPUs if the engine packs samples, else `per_device_train_batch_size`
    decides."""

    @property
    def needs_padding(self) -> bool:
        """True if a setting of the role needs padded samples."""
        return False

    def on_device(self, on_cuda: bool, model: str) -> Self:
        """Return the block of a role that holds `model`, with the values that null stands for.

        Args:
            on_cuda: the role computes on GPUs.
            model: Hugging Face name or folder, or a `builtin:` name.
        """
        args = self.strategy_args.on_device(on_cuda, model, padded=self.needs_padding)
        changes: dict[str, Any] = _token_budgets(self, args, on_cuda)
        if on_cuda and args.packs_samples and self.max_tokens_per_microbatch_in_train is None:
            changes["max_tokens_per_microbatch_in_train"] = TOKENS_PER_PASS_IN_TRAIN
        return self.model_copy(update=changes)

    def broken_rules(self) -> Iterator[Problem]:
        """Yield token budgets that the engine does not support."""
        yield from super().broken_rules()
        yield from _token_budget_rules(self)


class PolicyConfig(TrainedRoleConfig):
    """A trained policy, independent of its training data."""

    router_replay: RouterReplayConfig = RouterReplayConfig()
    """Replay of recorded experts in mixtures of experts, if the engine supports it."""

    @property
    def needs_padding(self) -> bool:
        """True if experts are recorded or replayed."""
        return self.router_replay.mode != "disable" or self.router_replay.record

    def broken_rules(self) -> Iterator[Problem]:
        """Yield settings that this role's engine or layout does not support."""
        yield from super().broken_rules()
        yield from broken_engine_rules(self.model_args.lora, self.strategy_args)
        replay, args = self.router_replay, self.strategy_args
        if not self.needs_padding:
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


class CriticConfig(TrainedRoleConfig):
    """The critic, which predicts values for `adv_estimator: gae`. Other estimators do not build it."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield settings that the engine does not support, and an engine without a value head."""
        yield from super().broken_rules()
        yield from not_trained(self.model_args.lora)
        if not self.strategy_args.has_value_head:
            able = shipped_engines(TrainStrategyArgs, lambda engine: engine.has_value_head)
            yield Problem(
                "strategy_args.strategy_name",
                f"'{self.strategy_args.strategy_name}' has no value head; choose {' or '.join(able)}",
            )
        for problem in self.strategy_args.value_problems():
            yield problem._replace(key=f"strategy_args.{problem.key}")


class ActorInferConfig(Schema):
    """The policy that generates."""

    strategy_args: SerializeAsAny[GenerateStrategyArgs]
    """Engine and its options."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling of training responses."""
    model_args: ModelArgs = ModelArgs()
    """Model."""
    device_mapping: DeviceMapping = None
    """Devices; null: one engine on the first device(s). Roles may share devices (`offload_states`)."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield an adapter, which the trainer has."""
        yield from super().broken_rules()
        yield from not_trained(self.model_args.lora)


class ReferenceConfig(Schema):
    """The frozen policy for KL terms. It is built only if a KL term is on."""

    strategy_args: SerializeAsAny[ScoreStrategyArgs]
    """Engine and its options."""
    model_args: ModelArgs = ModelArgs()
    """Model."""
    device_mapping: DeviceMapping = None
    """Devices; null: one rank on the first device. Roles may share devices (`offload_states`)."""
    infer_batch_size: PositiveInt = 16
    """Samples in one forward pass."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens (padding included) in one forward pass, instead of `infer_batch_size` samples, if the engine supports it.
    null: 32768 on GPUs if the engine packs samples, else `infer_batch_size` decides."""

    def on_device(self, on_cuda: bool, model: str) -> Self:
        """Return the block of a role that holds `model`, with the values that null stands for.

        Args:
            on_cuda: the role computes on GPUs.
            model: Hugging Face name or folder, or a `builtin:` name.
        """
        return self.model_copy(update=_token_budgets(self, self.strategy_args.on_device(on_cuda, model), on_cuda))

    def broken_rules(self) -> Iterator[Problem]:
        """Yield settings that an engine cannot use for scoring."""
        yield from super().broken_rules()
        yield from not_trained(self.model_args.lora)
        yield from _token_budget_rules(self)
        for problem in self.strategy_args.scoring_problems():
            yield problem._replace(key=f"strategy_args.{problem.key}")


def _token_budgets(block: TrainedRoleConfig | ReferenceConfig, args: StrategyArgs, on_cuda: bool) -> dict[str, Any]:
    """Return the changed keys of a block: the arguments of its engine, and the token budget of passes that score."""
    changes: dict[str, Any] = {"strategy_args": args}
    packs = on_cuda and args.packs_samples and args.supports_token_budget
    if packs and block.max_tokens_per_microbatch_in_infer is None:
        changes["max_tokens_per_microbatch_in_infer"] = TOKENS_PER_PASS_IN_INFER
    return changes


def _token_budget_rules(block: TrainedRoleConfig | ReferenceConfig) -> Iterator[Problem]:
    """Yield a token budget that the engine does not support."""
    budget, args = block.max_tokens_per_microbatch_in_infer, block.strategy_args
    if budget is not None and not args.supports_token_budget:
        able = shipped_engines(StrategyArgs, lambda engine: engine.supports_token_budget)
        key = "max_tokens_per_microbatch_in_infer"
        yield _not_supported(key, str(budget), args, able, "remove it (infer_batch_size decides)")


def _not_supported(key: str, value: str, args: StrategyArgs, able: Iterable[str], fix: str) -> Problem:
    """Return the problem of an unsupported key. The message lists the shipped engines that support it."""
    message = f"{value} is not supported by {args.strategy_name} (it is by {', '.join(able)}); {fix}"
    return Problem(key, message, ("strategy_args.strategy_name",))


Role = PolicyConfig | ActorInferConfig | ReferenceConfig | CriticConfig


class WarmStart(Schema):
    """Supervised warm start of a `builtin:` model on demonstrations of a task. It is cached in `output_dir`."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Demonstrations per step."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of AdamW with cosine decay."""
    demonstrations: BuiltinTask | Literal["adding_machine", "calculated_sums", "frozen_lake", "sokoban"] = (
        "builtin:column_addition"
    )
    """Task or environment of the demonstrations. If omitted: `actor_train.data_args.file_name`, if it is one of these
    tasks."""
    slip_probability: UnitInterval = 0.25
    """Probability of an error in a demonstration: a wrong column, or the response to another prompt. Errors leave room
    for reinforcement learning to improve the model."""
    seed: int = 0
    """Seed of weights and demonstrations. Runs of a comparison with different `seed` share one warm start."""


class CheckpointConfig(Schema):
    """Settings of checkpoints."""

    output_dir: str | None = None
    """Folder of the checkpoints; null: `checkpoints/` of the run."""
    max_ckpt_to_keep: NonNegativeInt = 2
    """Number of recent checkpoints to keep besides the best one; 0 keeps all."""
    keep_best: str | None = None
    """Validation metric that selects the best checkpoint, e.g. `validation/score_mean` or `validation/aime2024/avg@32`.
    A validation with a new best value saves a checkpoint. It is kept until a better one is complete, and
    `checkpoints/best.json` names it."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Direction in which `keep_best` improves."""
    async_save: bool = False
    """Continue with the next step while a checkpoint is written. The checkpoint is valid once it is complete."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield a `keep_best` that is no validation metric, and a mode without `keep_best`."""
        yield from super().broken_rules()
        if self.keep_best is not None and not self.keep_best.startswith("validation/"):
            message = f"'{self.keep_best}' is no metric of the validation; give one, e.g. validation/score_mean"
            yield Problem("keep_best", message)
        if self.keep_best is None and self.keep_best_mode != "max":
            yield used_only_with("keep_best_mode", "keep_best")


class WeightTransferConfig(Schema):
    """Settings of the weight transfer from the trainer to the engines with `execution: ray`."""

    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """Transport: `ipc` (CUDA IPC) if every engine shares its GPUs with the trainer, `nccl` between separate GPUs,
    `gloo` through host memory. `auto` selects in this order, and `gloo` without GPUs. If its selection cannot be
    started, it falls back to `gloo` with a warning."""
    checksum: bool = False
    """Compare the checksum of every received bucket. Only with `gloo`."""
    bucket_mb: PositiveInt | None = None
    """Size of a tensor bucket in MiB; null: 16 with `gloo`, 512 with `nccl`, 2048 with `ipc`, but not more than the
    model. Sender and receivers allocate one in addition to the model, with `nccl` two."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that sender and receivers wait for each other at any point."""
