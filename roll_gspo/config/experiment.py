"""The root of the configuration, and the rules that span its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from roll_gspo.config.algorithm import AlgorithmConfig
from roll_gspo.config.base import Schema
from roll_gspo.config.data import DataArgs, Template
from roll_gspo.config.ranks import broken_dtype_rules, broken_rank_rules, model_parallel_size, num_ranks
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.config.roles import (
    ActorInferConfig,
    ActorTrainConfig,
    CheckpointConfig,
    CriticConfig,
    ReferenceConfig,
    TrackerKwargs,
    WarmStart,
    WeightTransferConfig,
)
from roll_gspo.config.selection import QueryFilterConfig
from roll_gspo.config.strategy import VllmArgs
from roll_gspo.config.validation import ValidationConfig

# Values of adv_estimator and reward_norm that compare the samples of a group.
GROUP_COMPARISONS = ("grpo", "dr_grpo", "rloo", "opo", "raft_plus_plus", "reinforce_plus_plus_baseline", "group")


class BatchConfig(Schema):
    """How much is generated a step, how long it may be, and how many steps there are."""

    rollout_batch_size: PositiveInt
    """Prompts a step."""
    num_return_sequences_in_group: PositiveInt = 1
    """Samples a prompt: the group."""
    prompt_length: PositiveInt = 1024
    """Longest prompt in tokens; longer ones are dropped and counted, never cut."""
    response_length: PositiveInt | None = None
    """Longest response in tokens."""
    sequence_length: PositiveInt | None = None
    """prompt_length + response_length; give this or `response_length`."""
    max_steps: PositiveInt = 500
    """Rollouts of the whole run."""
    trace_groups: NonNegativeInt = 1
    """Groups a step that are scored again after the update, so that the report shows each token's ratio; 0: none."""
    val_prompt_length: PositiveInt | None = None
    """Longest prompt in validation, in tokens; null: `prompt_length`."""
    val_sequence_length: PositiveInt | None = None
    """Longest prompt plus longest response in validation; null: as much room for the response as in training, or
    `validation.generating_args.max_new_tokens`."""

    @property
    def max_response_length(self) -> int:
        """Longest response in tokens, whichever key gave it."""
        if self.response_length is not None:
            return self.response_length
        assert self.sequence_length is not None  # held by the rule below
        return self.sequence_length - self.prompt_length

    @property
    def max_sequence_length(self) -> int:
        """Longest prompt plus longest response in tokens."""
        return self.prompt_length + self.max_response_length

    @property
    def validation_prompt_length(self) -> int:
        """Longest prompt in validation, in tokens."""
        return self.val_prompt_length or self.prompt_length

    @property
    def samples_per_rollout(self) -> int:
        """Prompts times group size."""
        return self.rollout_batch_size * self.num_return_sequences_in_group

    def broken_rules(self) -> Iterator[str]:
        """Exactly one length decides, and leaves room."""
        yield from super().broken_rules()
        total, response = self.sequence_length, self.response_length
        if total is None and response is None:
            yield "response_length: missing; add it, or sequence_length"
        if total is not None and response is not None and total != self.prompt_length + response:
            yield (
                f"sequence_length {total} is not prompt_length {self.prompt_length} + response_length "
                f"{response}; remove one of the three"
            )
        elif total is not None and total <= self.prompt_length:
            yield f"sequence_length {total} leaves no room after prompt_length {self.prompt_length}; raise it"
        if self.val_sequence_length is not None and self.val_sequence_length <= self.validation_prompt_length:
            key = "val_prompt_length" if self.val_prompt_length else "prompt_length"
            yield (
                f"val_sequence_length {self.val_sequence_length} leaves no room after {key} "
                f"{self.validation_prompt_length}; raise it"
            )


class RunConfig(Schema):
    """The run itself: name, length, output, tracking, state."""

    exp_name: str = "roll_gspo"
    """Name of the experiment: its runs lie in `output_dir/exp_name`."""
    run_name: str | None = None
    """Folder of this run below `output_dir/exp_name`; null: date and time."""
    seed: NonNegativeInt = 42
    """Of data order, sampling and initialisation."""
    pipeline: Literal["rlvr", "sft"] = "rlvr"
    """Which training loop: reinforcement learning, or supervised fine-tuning (which has keys of its own, below)."""
    execution: Literal["local", "ray"] = "local"
    """Where roles live: in this process, or as Ray actors."""
    worker_timeout_s: PositiveFloat = 1800.0
    """Seconds that one call of a Ray worker may take (a whole update, a share of the generation) before it is hung."""
    max_worker_restarts: NonNegativeInt = 3
    """Generation workers that may be lost and started again in one run."""
    max_restarts: NonNegativeInt = 0
    """Times that a run whose trainer or other worker was lost goes on from its last checkpoint by itself."""
    pretrain: str
    """Hugging Face name or folder of the model to start from, or `builtin:NAME` (made on the spot)."""
    global_template: Template | None = None
    """Chat template of all data, instead of `data_args.template`."""
    tag_to_template: dict[str, Template] = Field(default_factory=dict)
    """Chat templates of the rows with a tag, instead of every other."""
    warm_start: WarmStart | None = None
    """Supervised start of a `builtin:` model."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    eval_steps: PositiveInt = 10
    """Steps between validations."""
    logging_steps: PositiveInt = 1
    """Steps between lines on a console that is not a terminal."""
    output_dir: str = "./output"
    """Folder of all experiments."""
    logging_dir: str | None = None
    """Folder of `run.log`; null: the run's folder."""
    resume_from_checkpoint: bool | str = False
    """`true`: go on from the newest complete checkpoint of `exp_name`; or the path of one."""
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    """How checkpoints are kept."""
    track_with: Literal["tensorboard", "stdout", "none"] = "tensorboard"
    """Tracker beside `metrics.jsonl`, which is always written."""
    tracker_kwargs: TrackerKwargs = TrackerKwargs()
    """Options of the tracker."""
    system_envs: dict[str, str] = Field(default_factory=dict)
    """Environment variables, set before any engine is imported."""
    num_gpus_per_node: NonNegativeInt = 8
    """Devices of one machine; device numbers beyond it are on the next machine."""
    num_nodes: PositiveInt | None = None
    """Machines; null: as many as the device mappings reach."""
    weight_transfer: WeightTransferConfig = WeightTransferConfig()
    """How new weights travel from the trainer to the engines."""

    def broken_rules(self) -> Iterator[str]:
        """Only builtin models are made ready."""
        yield from super().broken_rules()
        if self.warm_start and not self.pretrain.startswith("builtin:"):
            yield (
                f"warm_start makes a builtin: model ready for its task, but pretrain is '{self.pretrain}'; "
                "set warm_start: null"
            )


class ExperimentConfig(RunConfig, BatchConfig, AlgorithmConfig):
    """Everything one YAML file may say."""

    actor_train: ActorTrainConfig
    """The policy that is trained."""
    actor_infer: ActorInferConfig
    """The policy that generates."""
    reference: ReferenceConfig | None = None
    """The frozen policy; needed where a KL term is switched on."""
    critic: CriticConfig | None = None
    """The model of values; needed by `adv_estimator: gae`."""
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Reward domains by name."""
    validation: ValidationConfig | None = None
    """Held-out prompts."""

    @property
    def query_filters(self) -> dict[str, QueryFilterConfig]:
        """What dynamic sampling drops, by reward domain; without those where it drops nothing."""
        found = {
            domain: block.query_filter_config or self.query_filter_config for domain, block in self.rewards.items()
        }
        return {domain: block for domain, block in found.items() if block is not None and block.type != "no_filter"}

    @property
    def filters_groups(self) -> bool:
        """Whether dynamic sampling is on, for any domain."""
        return bool(self.query_filters)

    @property
    def validation_response_length(self) -> int:
        """Longest response in validation, in tokens, whichever key gave it."""
        if self.validation is not None and self.validation.generating_args.max_new_tokens is not None:
            return self.validation.generating_args.max_new_tokens
        if self.val_sequence_length is not None:
            return self.val_sequence_length - self.validation_prompt_length
        return self.max_response_length

    @property
    def engine_sequence_length(self) -> int:
        """Longest prompt plus response that the generation engine has to hold, in training or validation."""
        if self.validation is None:
            return self.max_sequence_length
        return max(self.max_sequence_length, self.validation_prompt_length + self.validation_response_length)

    @property
    def data_parallel_size(self) -> int:
        """Copies of the trained model."""
        return num_ranks(self.actor_train) // model_parallel_size(self.actor_train)

    @property
    def mini_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.actor_train.training_args.mini_batch_size_per_rank * self.data_parallel_size

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps a rollout."""
        return self.samples_per_rollout * self.ppo_epochs // self.mini_batch_size

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the actor in the whole run."""
        return self.updates_per_rollout * (self.max_steps - self.critic_warmup)

    @property
    def critic_data_parallel_size(self) -> int:
        """Copies of the critic."""
        assert self.critic is not None  # held by the rules below where the critic is needed
        return num_ranks(self.critic) // model_parallel_size(self.critic)

    @property
    def critic_mini_batch_size(self) -> int:
        """Samples of one optimizer step of the critic over all ranks."""
        assert self.critic is not None
        return self.critic.training_args.mini_batch_size_per_rank * self.critic_data_parallel_size

    @property
    def critic_updates_per_rollout(self) -> int:
        """Optimizer steps of the critic a rollout."""
        return self.samples_per_rollout * self.ppo_epochs // self.critic_mini_batch_size

    def broken_rules(self) -> Iterator[str]:
        """The rules that span blocks."""
        yield from super().broken_rules()
        yield from self._broken_batch_rules()
        yield from self._broken_group_rules()
        yield from self._broken_sampling_rules()
        yield from self._broken_model_rules()
        yield from self._broken_replay_rules()
        yield from self._broken_data_rules("actor_train", self.actor_train.data_args)
        if self.validation is not None:
            yield from self._broken_data_rules("validation", self.validation.data_args)
        yield from self._broken_validation_rules()
        if self.needs_critic and self.critic is None:
            yield "adv_estimator: gae needs the critic block; add it (adv_estimator=gae as a group option does)"
        if self.critic_warmup >= self.max_steps:
            yield f"critic_warmup {self.critic_warmup} leaves none of max_steps {self.max_steps} to the actor; lower it"
        if self.needs_reference and self.reference is None:
            flag = "use_kl_loss" if self.use_kl_loss else "add_token_level_kl"
            yield f"{flag}: true needs the reference block; add it"

    def _broken_data_rules(self, role: str, args: DataArgs) -> Iterator[str]:
        """Domains of the data are blocks of `rewards`."""
        named = {
            "domain_interleave_probs": args.domain_interleave_probs or (),
            "domain_system_prompts": args.domain_system_prompts,
            "file_domains": args.file_domains.values(),
            "domain": [args.domain] if args.domain is not None else [],
        }
        for key, domains in named.items():
            if strange := sorted({d for d in domains if d not in self.rewards}):
                yield (
                    f"{role}.data_args.{key} names {', '.join(strange)}, but the blocks of rewards are "
                    f"{', '.join(self.rewards)}; write it as there, or add the block"
                )

    def _broken_validation_rules(self) -> Iterator[str]:
        if self.validation is None:
            if self.checkpoint_config.keep_best is not None:
                yield (
                    f"checkpoint_config.keep_best: {self.checkpoint_config.keep_best} needs the validation block; add "
                    "it, or remove the key"
                )
            for key, value in (
                ("val_prompt_length", self.val_prompt_length),
                ("val_sequence_length", self.val_sequence_length),
            ):
                if value is not None:
                    yield f"{key} {value} acts with the validation block only; add it, or remove the key"
            return
        tokens, total = self.validation.generating_args.max_new_tokens, self.val_sequence_length
        if tokens is not None and total is not None and total != self.validation_prompt_length + tokens:
            yield (
                f"val_sequence_length {total} is not the prompt's {self.validation_prompt_length} + "
                f"validation.generating_args.max_new_tokens {tokens}; remove one of them"
            )

    def _broken_model_rules(self) -> Iterator[str]:
        trained = self.actor_train.model_args.model_name_or_path or self.pretrain
        generates = self.actor_infer.model_args.model_name_or_path
        if generates not in (None, trained):
            yield (
                f"actor_infer.model_args.model_name_or_path is '{generates}', but actor_train starts from '{trained}' "
                "and hands it every weight; remove the first"
            )
        roles = {"actor_train": self.actor_train, "reference": self.reference, "critic": self.critic}
        for role, block in roles.items():
            if block is not None:
                yield from broken_dtype_rules(role, block)

    def _broken_batch_rules(self) -> Iterator[str]:
        yield from self._broken_mini_batch_rules("actor_train", self.actor_train)
        if self.needs_critic and self.critic is not None:
            yield from self._broken_mini_batch_rules("critic", self.critic)
        length_is_known = self.response_length is not None or self.sequence_length is not None
        buffer = self.overlong_buffer_length
        if length_is_known and buffer is not None and buffer >= self.max_response_length:
            yield (
                f"overlong_buffer_length {buffer} is not below response_length {self.max_response_length}, so that "
                "every response is punished; lower it"
            )

    def _broken_mini_batch_rules(self, role: str, block: ActorTrainConfig | CriticConfig) -> Iterator[str]:
        ranks, copy = num_ranks(block), model_parallel_size(block)
        args = block.training_args
        mini_batch = args.mini_batch_size_per_rank * (ranks // copy)
        if ranks % copy:
            yield from broken_rank_rules(role, block)
        elif self.samples_per_rollout % mini_batch:
            yield (
                f"rollout_batch_size {self.rollout_batch_size} * num_return_sequences_in_group "
                f"{self.num_return_sequences_in_group} = {self.samples_per_rollout} samples are not a multiple of "
                f"the mini-batch of {mini_batch} ({role}.training_args.per_device_train_batch_size "
                f"{args.per_device_train_batch_size} * {role}.training_args.gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} * data-parallel size {ranks // copy}); change one"
            )

    def _broken_replay_rules(self) -> Iterator[str]:
        replay, block = self.actor_train.router_replay, "actor_train.router_replay"
        if replay.reads_rollout and not isinstance(self.actor_infer.strategy_args, VllmArgs):
            key = "mode: R3" if replay.mode == "R3" else "record: true"
            yield (
                f"{block}.{key} needs the experts that vllm chose while sampling, but actor_infer.strategy_args is "
                f"{self.actor_infer.strategy_args.strategy_name}; set strategy=megatron, or router_replay=none"
            )
        if replay.mode == "R2" and not self.enable_old_logprobs_recompute:
            yield (
                f"{block}.mode: R2 replays the experts of the pass that recomputes old log-probs, which "
                "enable_old_logprobs_recompute: false leaves out; set that flag to true, or mode: R3"
            )

    def _broken_group_rules(self) -> Iterator[str]:
        if self.num_return_sequences_in_group > 1:
            return
        way_out = "set num_return_sequences_in_group to 2 or more"
        for key, value in (("adv_estimator", self.adv_estimator), ("reward_norm", self.reward_norm)):
            if value in GROUP_COMPARISONS:
                yield f"{key}: {value} compares the samples of a prompt, and there is one; {way_out}"
        if self.filters_groups:
            yield f"query_filter_config compares the samples of a prompt, and there is one; {way_out}"
        if self.difficulty_mask:
            yield f"difficulty_mask: true takes the mean score of a prompt's samples, and there is one; {way_out}"

    def _broken_sampling_rules(self) -> Iterator[str]:
        sampling, block = self.actor_infer.generating_args, "actor_infer.generating_args"
        if sampling.num_return_sequences not in (None, self.num_return_sequences_in_group):
            yield (
                f"{block}.num_return_sequences is {sampling.num_return_sequences}, but "
                f"num_return_sequences_in_group is {self.num_return_sequences_in_group}; remove the first"
            )
        length_is_known = self.response_length is not None or self.sequence_length is not None
        if length_is_known and sampling.max_new_tokens not in (None, self.max_response_length):
            yield (
                f"{block}.max_new_tokens is {sampling.max_new_tokens}, but response_length is "
                f"{self.max_response_length}; remove the first"
            )
        if sampling.temperature == 0:
            yield f"{block}.temperature: 0 is greedy, and equal answers teach nothing; set it above 0"
