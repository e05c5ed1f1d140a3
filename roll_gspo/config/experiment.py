"""The root of the configuration, and the rules that span its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from roll_gspo.config.algorithm import AlgorithmConfig
from roll_gspo.config.asynchronous import AsyncConfig
from roll_gspo.config.base import Names, Problem
from roll_gspo.config.batch import BatchConfig
from roll_gspo.config.credit import unused_credit
from roll_gspo.config.data import DataArgs
from roll_gspo.config.environment_table import AGENT, OTHERS
from roll_gspo.config.environments import EpisodeConfig
from roll_gspo.config.episode_rules import OtherBlocks, broken_episode_rules
from roll_gspo.config.lora import adapter_sync, broken_sync_rules
from roll_gspo.config.ranks import broken_dtype_rules, broken_rank_rules, data_parallel_size, num_ranks
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.config.roles import (
    ActorInferConfig,
    ActorTrainConfig,
    CriticConfig,
    ReferenceConfig,
    Role,
    TrainedRoleConfig,
)
from roll_gspo.config.run import RunConfig
from roll_gspo.config.selection import QueryFilterConfig
from roll_gspo.config.strategy import GenerateStrategyArgs, shipped_engines
from roll_gspo.config.validation import ValidationConfig
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS

# Learning rates of a critic that sets none.
CRITIC_RATE, BUILTIN_CRITIC_RATE = 1e-5, 1e-3


class ExperimentConfig(RunConfig, BatchConfig, AsyncConfig, EpisodeConfig, AlgorithmConfig):
    """All keys of `pipeline: rlvr`."""

    actor_train: ActorTrainConfig
    """The policy that is trained."""
    actor_infer: ActorInferConfig
    """The policy that generates."""
    reference: ReferenceConfig | None = None
    """The frozen policy; needed by a KL term."""
    critic: CriticConfig | None = None
    """The value model; needed by `adv_estimator: gae`. If omitted, its learning rate is 1e-5, or 1e-3 for a `builtin:`
    model, whose value head has few steps to learn."""
    rewards: dict[str, RewardConfig]
    """Reward domains by name; none if environments give the rewards."""
    validation: ValidationConfig | None = None
    """Held-out prompts."""

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in the overlong buffer if it is a share, and the learning rate of the critic."""
        values = super().fill_defaults(values)
        share, response = values.get("overlong_buffer_length"), values.get("response_length")
        if response is None and isinstance(total := values.get("sequence_length"), int):
            response = total - values.get("prompt_length", cls.model_fields["prompt_length"].default)
        if isinstance(share, float) and 0 < share < 1 and isinstance(response, int):
            values["overlong_buffer_length"] = max(1, round(share * response))
        critic = values.get("critic")
        args = critic.get("training_args") if isinstance(critic, dict) else None
        if isinstance(critic, dict) and isinstance(args, dict) and "learning_rate" not in args:
            rate = BUILTIN_CRITIC_RATE if str(values.get("pretrain")).startswith("builtin:") else CRITIC_RATE
            values["critic"] = critic | {"training_args": args | {"learning_rate": rate}}
        return values

    def roles(self) -> dict[str, Role]:
        """Return the roles that are built and hold a model, by name."""
        roles: dict[str, Role] = {"actor_train": self.actor_train, "actor_infer": self.actor_infer}
        if self.needs_reference and self.reference is not None and not self.reference_is_base:
            roles["reference"] = self.reference
        if self.needs_critic and self.critic is not None:
            roles["critic"] = self.critic
        return roles

    @property
    def reference_is_base(self) -> bool:
        """True if the reference is the model under the adapter of `actor_train`, so that it needs no copy."""
        trained = self.actor_train.model_args
        own = None if self.reference is None else self.reference.model_args.model_name_or_path
        models = {trained.model_name_or_path or self.pretrain, own or self.pretrain}
        return self.needs_reference and trained.lora is not None and len(models) == 1

    @property
    def sends_adapters(self) -> bool:
        """True if the generation engine holds the model and receives the adapter of `actor_train` alone."""
        lora = self.actor_train.model_args.lora
        return lora is not None and adapter_sync(lora, self.actor_infer.strategy_args) == "adapter"

    @property
    def scoring_temperature(self) -> float:
        """Temperature of all log-probs: that of the training responses."""
        return self.actor_infer.generating_args.temperature

    @property
    def domain_tags(self) -> dict[str, Names]:
        """Tags of the rows of each domain: of each block of `rewards`, of the environments, or of the agent."""
        if self.agent is not None:
            return {AGENT: (OTHERS,)}
        if self.plays_episodes:
            return {name: block.tag_included for name, block in self.played_environments.items()}
        return {domain: block.tag_included for domain, block in self.rewards.items()}

    @property
    def domain_shares(self) -> dict[str, float] | None:
        """Share of each domain in a batch of training prompts, or None to shuffle all rows together."""
        return self.environment_shares or self.actor_train.data_args.domain_interleave_probs

    @property
    def query_filters(self) -> dict[str, QueryFilterConfig]:
        """Filters of dynamic sampling by domain, without domains that drop nothing."""
        own = {domain: block.query_filter_config for domain, block in self.rewards.items()}
        found = {domain: own.get(domain) or self.query_filter_config for domain in self.domain_tags}
        return {domain: block for domain, block in found.items() if block is not None and block.type != "no_filter"}

    @property
    def filters_groups(self) -> bool:
        """True if dynamic sampling is on for any domain."""
        return bool(self.query_filters)

    @property
    def validation_response_length(self) -> int:
        """Longest response in validation, in tokens."""
        if self.validation is not None and self.validation.generating_args.max_new_tokens is not None:
            return self.validation.generating_args.max_new_tokens
        if self.val_sequence_length is not None:
            return self.val_sequence_length - self.validation_prompt_length
        return self.max_response_length

    @property
    def engine_sequence_length(self) -> int:
        """Longest prompt plus response of training and validation, in tokens."""
        if self.validation is None:
            return self.max_sequence_length
        return max(self.max_sequence_length, self.validation_prompt_length + self.validation_response_length)

    @property
    def data_parallel_size(self) -> int:
        """Number of copies of the trained model."""
        return data_parallel_size(self.actor_train)

    @property
    def mini_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.actor_train.training_args.mini_batch_size_per_rank * self.data_parallel_size

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.samples_per_rollout * self.ppo_epochs // self.mini_batch_size

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the actor in the whole run."""
        return self.updates_per_rollout * (self.max_steps - self.critic_warmup)

    @property
    def critic_data_parallel_size(self) -> int:
        """Number of copies of the critic."""
        assert self.critic is not None  # guaranteed by the rules below
        return data_parallel_size(self.critic)

    @property
    def critic_mini_batch_size(self) -> int:
        """Samples per optimizer step of the critic over all ranks."""
        assert self.critic is not None
        return self.critic.training_args.mini_batch_size_per_rank * self.critic_data_parallel_size

    @property
    def critic_updates_per_rollout(self) -> int:
        """Optimizer steps of the critic per rollout."""
        return self.samples_per_rollout * self.ppo_epochs // self.critic_mini_batch_size

    def broken_rules(self) -> Iterator[Problem]:
        """Yield broken rules between blocks."""
        yield from super().broken_rules()
        yield from self._broken_batch_rules()
        yield from self._broken_group_rules()
        yield from self._broken_sampling_rules()
        yield from self._broken_model_rules()
        yield from self._broken_replay_rules()
        yield from self._broken_async_rules()
        if not self.plays_episodes:
            yield from unused_credit(self)
        others = OtherBlocks(
            rewards=tuple(self.rewards),
            num_groups=self.rollout_batch_size,
            group_size=self.num_return_sequences_in_group,
            data=self.actor_train.data_args,
            validation=self.validation,
            replays_rollout=self.actor_train.router_replay.reads_rollout,
            has_tag_templates=bool(self.tag_to_template),
        )
        yield from broken_episode_rules(self, others)
        yield from self._broken_data_rules("actor_train", self.actor_train.data_args)
        if self.validation is not None:
            yield from self._broken_data_rules("validation", self.validation.data_args)
        yield from self._broken_validation_rules()
        if self.needs_critic and self.critic is None:
            name = self.adv_estimator
            message = f"{name} needs the critic block; add it (the group option adv_estimator=gae shows how)"
            yield Problem("adv_estimator", message, ("critic",))
        if self.critic_warmup >= self.max_steps:
            message = f"{self.critic_warmup} leaves none of max_steps {self.max_steps} to the actor; lower it"
            yield Problem("critic_warmup", message, ("max_steps",))
        yield from broken_sync_rules(self.actor_train.model_args.lora, self.actor_infer.strategy_args)
        if self.needs_reference and self.reference is None and not self.reference_is_base:
            switches = ("use_kl_loss", "add_token_level_kl")
            key = next((switch for switch in switches if self.__dict__[switch]), "policy_loss")
            value = "true" if key in switches else self.policy_loss
            yield Problem(key, f"{value} needs the reference block; add it", ("reference",))

    def _broken_data_rules(self, role: str, args: DataArgs) -> Iterator[Problem]:
        """Yield domains of the data that are not blocks of `rewards` or `custom_envs`."""
        if self.agent is not None and not args.domain_interleave_probs:
            return  # an agent plays rows of any domain
        blocks = "custom_envs" if self.plays_episodes else "rewards"
        named = {
            "domain_interleave_probs": args.domain_interleave_probs or (),
            "domain_system_prompts": args.domain_system_prompts,
            "file_domains": args.file_domains.values(),
            "domain": [args.domain] if args.domain is not None else [],
        }
        for key, domains in named.items():
            if strange := sorted({d for d in domains if d not in self.domain_tags}):
                yield Problem(
                    f"{role}.data_args.{key}",
                    f"{', '.join(strange)} is no block of {blocks} ({', '.join(self.domain_tags)}); write it as there, "
                    "or add the block",
                    (blocks,),
                )

    def _broken_validation_rules(self) -> Iterator[Problem]:
        if self.validation is None:
            if self.checkpoint_config.keep_best is not None:
                message = f"{self.checkpoint_config.keep_best} needs the validation block; add it, or remove the key"
                yield Problem("checkpoint_config.keep_best", message, ("validation",))
            for key, value in (
                ("val_prompt_length", self.val_prompt_length),
                ("val_sequence_length", self.val_sequence_length),
            ):
                if value is not None:
                    yield Problem(
                        key, f"{value} needs the validation block; add it, or remove the key", ("validation",)
                    )
            return
        tokens, total = self.validation.generating_args.max_new_tokens, self.val_sequence_length
        if tokens is not None and total is not None and total != self.validation_prompt_length + tokens:
            yield Problem(
                "val_sequence_length",
                f"{total} is not the prompt's {self.validation_prompt_length} + "
                f"validation.generating_args.max_new_tokens {tokens}; remove one of them",
                ("val_prompt_length", "validation.generating_args.max_new_tokens"),
            )

    def _broken_model_rules(self) -> Iterator[Problem]:
        trained = self.actor_train.model_args.model_name_or_path or self.pretrain
        generates = self.actor_infer.model_args.model_name_or_path
        if generates not in (None, trained):
            yield Problem(
                "actor_infer.model_args.model_name_or_path",
                f"'{generates}' differs from '{trained}', the model of actor_train, which sends all its weights; "
                "remove it",
                ("actor_train.model_args.model_name_or_path", "pretrain"),
            )
        roles = {"actor_train": self.actor_train, "reference": self.reference, "critic": self.critic}
        for role, block in roles.items():
            if block is not None:
                yield from broken_dtype_rules(role, block)

    def _broken_batch_rules(self) -> Iterator[Problem]:
        yield from self._broken_mini_batch_rules("actor_train", self.actor_train)
        if self.needs_critic and self.critic is not None:
            yield from self._broken_mini_batch_rules("critic", self.critic)
        length_is_known = self.response_length is not None or self.sequence_length is not None
        buffer = self.overlong_buffer_length
        if length_is_known and buffer is not None and buffer >= self.max_response_length:
            yield Problem(
                "overlong_buffer_length",
                f"{buffer} is not below response_length {self.max_response_length}, so every response is punished; "
                "lower it",
                ("response_length", "sequence_length"),
            )

    def _broken_mini_batch_rules(self, role: str, block: TrainedRoleConfig) -> Iterator[Problem]:
        args, copies = block.training_args, data_parallel_size(block)
        mini_batch = args.mini_batch_size_per_rank * copies
        if num_ranks(block) % block.strategy_args.model_parallel_size:
            yield from broken_rank_rules(role, block)
        elif self.samples_per_rollout % mini_batch:
            micro = f"{role}.training_args.per_device_train_batch_size"
            accumulated = f"{role}.training_args.gradient_accumulation_steps"
            yield Problem(
                "rollout_batch_size",
                f"{self.rollout_batch_size} * num_return_sequences_in_group {self.num_return_sequences_in_group} = "
                f"{self.samples_per_rollout} samples are not a multiple of the mini-batch of {mini_batch} ("
                f"{micro} {args.per_device_train_batch_size} * {accumulated} {args.gradient_accumulation_steps} * "
                f"data-parallel size {copies}); change one",
                ("num_return_sequences_in_group", micro, accumulated),
            )

    def _broken_replay_rules(self) -> Iterator[Problem]:
        replay, block = self.actor_train.router_replay, "actor_train.router_replay"
        mode = f"{block}.mode"
        engine = self.actor_infer.strategy_args
        if replay.reads_rollout and not engine.returns_routed_experts:
            key, value = (mode, "R3") if replay.mode == "R3" else (f"{block}.record", "true")
            name = "actor_infer.strategy_args.strategy_name"
            able = shipped_engines(GenerateStrategyArgs, lambda engine: engine.returns_routed_experts)
            yield Problem(
                key,
                f"{value} needs the experts of each sampled token, and {name} {engine.strategy_name} does not return "
                f"them; set it to {' or '.join(able)}, or router_replay=none",
                (name,),
            )
        if replay.mode == "R2" and not self.enable_old_logprobs_recompute:
            yield Problem(
                mode,
                "R2 replays the experts of the pass that recomputes old log-probs, and enable_old_logprobs_recompute: "
                "false skips that pass; set that switch to true, or mode: R3",
                ("enable_old_logprobs_recompute",),
            )

    def _broken_async_rules(self) -> Iterator[Problem]:
        gate = self.staleness_gate
        if gate is not None and gate.action == "wait" and not self.updates_in_flight:
            yield Problem(
                "staleness_gate.action",
                "wait samples the groups in flight again, which only async_mode: in_flight allows; set skip or stop",
                ("async_mode", "async_generation_ratio"),
            )
        if not self.updates_in_flight:
            return
        if self.execution == "local":
            yield Problem(
                "async_mode",
                "in_flight changes the weights of an engine while it samples, but execution: local trains and samples "
                "in turn; set execution: ray, or async_mode: one_step_off",
                ("execution", "async_generation_ratio"),
            )
        if self.actor_train.router_replay.reads_rollout and self.partial_rollouts == "continue":
            yield Problem(
                "partial_rollouts",
                "continue mixes the experts of several versions in one response, which cannot be replayed; set "
                "partial_rollouts: restart, or router_replay=none",
                ("actor_train.router_replay.mode", "actor_train.router_replay.record", "async_mode"),
            )

    def _broken_group_rules(self) -> Iterator[Problem]:
        if self.num_return_sequences_in_group > 1:
            return
        size = "num_return_sequences_in_group"
        why = f"compares the samples of a prompt, and there is one; set {size} to 2 or more"
        if ADVANTAGE_ESTIMATORS.declaration(self.adv_estimator).compares_group:
            yield Problem("adv_estimator", f"{self.adv_estimator} {why}", (size,))
        if self.reward_norm == "group":
            yield Problem("reward_norm", f"group {why}", (size,))
        if self.filters_groups:
            yield Problem("query_filter_config", why, (size,))
        if self.difficulty_mask:
            yield Problem("difficulty_mask", f"true {why}", (size,))

    def _broken_sampling_rules(self) -> Iterator[Problem]:
        sampling, block = self.actor_infer.generating_args, "actor_infer.generating_args"
        if sampling.num_return_sequences not in (None, self.num_return_sequences_in_group):
            yield Problem(
                f"{block}.num_return_sequences",
                f"{sampling.num_return_sequences} is not num_return_sequences_in_group "
                f"{self.num_return_sequences_in_group}; remove it",
                ("num_return_sequences_in_group",),
            )
        length_is_known = self.response_length is not None or self.sequence_length is not None
        if length_is_known and sampling.max_new_tokens not in (None, self.max_response_length):
            yield Problem(
                f"{block}.max_new_tokens",
                f"{sampling.max_new_tokens} is not response_length {self.max_response_length}; remove it",
                ("response_length", "sequence_length"),
            )
        is_truncated = sampling.top_p < 1 or sampling.top_k > 0
        if is_truncated and self.mismatch_gate is not None and self.mismatch_gate.action == "stop":
            yield Problem(
                "mismatch_gate.action",
                f"stop cannot be measured with {block}.top_p {sampling.top_p:g} and top_k {sampling.top_k}: the "
                "engine's log-probs are of the truncated distribution; set top_p: 1, top_k: 0, or action: warn",
                (f"{block}.top_p", f"{block}.top_k"),
            )
        if sampling.temperature == 0:
            message = "0 is greedy, and equal responses have no advantage; set it above 0"
            yield Problem(f"{block}.temperature", message)
