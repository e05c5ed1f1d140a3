"""ROLL keys that are ignored, or that are not supported yet. Every other unknown key is an error.

The tables hold dotted key paths; a leading `*.` matches any role, and `rewards.*` any reward domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from roll_gspo.config.algorithm import AlgorithmConfig
from roll_gspo.config.base import Problem
from roll_gspo.declarations import EXTENSIBLE
from roll_gspo.registry import is_dotted_path

ROLES = ("actor_train", "actor_infer", "reference", "critic", "validation")
NEVER_READ = "ROLL never reads it"
OVERWRITTEN = "ROLL overwrites it"
ALONE = "it acts with {} only, which is not supported yet"
_RECOMPUTE = "recompute_granularity (megatron) or gradient_checkpointing (hf) of strategy_config decides"

IGNORED: dict[str, str] = {
    # run
    **dict.fromkeys(("base_dir", "local_rank", "report_length_and_rewards", "length_profiler_dir"), NEVER_READ),
    "val_batch_size": "ROLL never reads it; validation.batch_size decides",
    **dict.fromkeys(("is_offload_states", "is_offload_optimizer_states_in_train_step"), NEVER_READ),
    "rpc_timeout": "worker_timeout_s decides (rewards have timeout_s)",
    "model_download_type": "transformers reads the Hugging Face hub, or a local folder",
    "model_update_buffer_size_mb": "weight_transfer.bucket_mb decides",
    "checkpoint_config.type": "checkpoints are folders on a file system",
    "checkpoint_config.async_upload": "checkpoints are written in place and renamed when complete",
    "profiler_output_dir": "traces go to profile/ of the run",
    "otlp_output_dir": ALONE.format("OpenTelemetry tracing"),
    "offload_nccl": OVERWRITTEN,
    # rollout scheduling: how fast, not what
    "max_running_requests": "max_num_seqs of actor_infer's strategy_config decides how many are decoded together",
    "max_additional_running_prompts": ALONE.format("is_use_additional_prompts"),
    "router_args": "one engine answers all requests",
    "dataset_filter": NEVER_READ,
    # algorithm
    "reward_pretrain": "worker_args.model_name_or_path of a reward_model names it",
    "error_max_len_threshold": ALONE.format("error_max_len_clip"),
    **dict.fromkeys(
        (
            *("postive_loss_coef", "positive_loss_coef", "use_topr_neg_loss_coef", "use_policy_loss_type"),
            *("use_topr_loss", "l2", "use_reward_scaling", "use_reward_norm", "add_len_reward", "val_greedy"),
            *("val_n_sample", "mask_type", "balance_length", "minibatch_data_iter_num", "reward"),
        ),
        NEVER_READ,
    ),
    # roles
    "actor_infer.data_args": "prompts come from actor_train.data_args",
    "reference.data_args": "the reference scores what actor_infer generated",
    "reference.generating_args": "the reference does not generate",
    "actor_train.generating_args": "actor_infer.generating_args decides how responses are sampled",
    "critic.data_args": "the critic is trained on the samples of actor_infer",
    "critic.generating_args": "the critic does not generate",
    "critic.model_args.model_type": "the critic's model always has a value head",
    "actor_infer.training_args": "the generation engine does not train",
    "reference.training_args": "the reference does not train",
    "actor_infer.infer_batch_size": "max_num_seqs of strategy_config decides how many are decoded together",
    **dict.fromkeys(("*.name", "*.offload_nccl"), OVERWRITTEN),
    "*.backend_timeout": "worker_timeout_s decides",
    "*.max_concurrency": "a worker answers one call at a time",
    "*.num_gpus_per_worker": "the parallel sizes of strategy_config decide",
    "*.logits_in_fp32": "log-probs and entropies are always computed in float32",
    **dict.fromkeys(
        ("*.sequence_length_round_in_train", "*.sequence_length_round_in_infer"),
        "samples are padded to the longest of their micro-batch, no further",
    ),
    **dict.fromkeys(
        ("actor_infer.max_tokens_per_microbatch_in_infer", "actor_infer.use_dynamic_batching_in_infer"),
        "max_num_batched_tokens of strategy_config decides",
    ),
    **dict.fromkeys(
        (
            *("actor_infer.max_tokens_per_microbatch_in_train", "actor_infer.use_dynamic_batching_in_train"),
            *("reference.max_tokens_per_microbatch_in_train", "reference.use_dynamic_batching_in_train"),
        ),
        "the role does not train",
    ),
    "*.sequence_packing_args": "max_tokens_per_microbatch_in_train and max_tokens_per_microbatch_in_infer decide",
    "*.model_args.flash_attn": NEVER_READ,
    "*.model_args.attn_implementation": "the engine chooses (hf: attn_implementation of strategy_config)",
    "*.model_args.disable_gradient_checkpointing": _RECOMPUTE,
    "*.model_args.gradient_checkpointing_use_reentrant": _RECOMPUTE,
    "*.model_args.device_map": "device_mapping decides",
    **dict.fromkeys(
        (
            *("*.model_args.lora_rank", "*.model_args.lora_alpha", "*.model_args.lora_dropout"),
            *("*.model_args.additional_target", "*.model_args.autocast_adapter_dtype", "lora_rank", "lora_alpha"),
        ),
        "it acts with lora_target only (write actor_train.model_args.lora)",
    ),
    "*.training_args.num_train_epochs": "it has no effect in ROLL either; max_steps and ppo_epochs decide",
    "*.training_args.dataloader_num_workers": "there is no data loader: rollouts are already in memory",
    **dict.fromkeys(("*.training_args.output_dir", "*.training_args.max_steps", "*.training_args.seed"), OVERWRITTEN),
    "*.training_args.data_seed": "the top-level seed decides",
    **dict.fromkeys(("*.training_args.bf16", "*.training_args.fp16"), "model_args.dtype decides"),
    **dict.fromkeys(("*.data_args.dataset_dir", "*.data_args.interleave_probs"), NEVER_READ),
    **dict.fromkeys(("*.data_args.id", "*.data_args.response", "*.data_args.eval_file_name"), NEVER_READ),
    "*.data_args.preprocessing_num_workers": "prompts are tokenized once, in this process",
    "*.data_args.dataset_type": "the ending of a file's name decides",
    "*.generating_args.max_length": "max_new_tokens and response_length decide",
    "*.generating_args.include_stop_str_in_output": ALONE.format("stop_strings"),
    "validation.eval_steps": "ROLL never reads it; the top-level eval_steps decides",
    "*.strategy_args.strategy_config.max_model_len": "prompt_length and response_length decide",
    **dict.fromkeys(
        (
            *("*.strategy_args.strategy_config.block_size", "*.strategy_args.strategy_config.VLLM_USE_V1"),
            "*.strategy_args.strategy_config.disable_custom_all_reduce",
            *(
                "*.strategy_args.strategy_config.cuda_graph_sizes",
                "*.strategy_args.strategy_config.cudagraph_capture_sizes",
            ),
            *(
                "*.strategy_args.strategy_config.disable_log_stats",
                "*.strategy_args.strategy_config.optimization_level",
            ),
            "*.strategy_args.strategy_config.distributed_executor_backend",
        ),
        "vLLM chooses",
    ),
    **dict.fromkeys(
        (
            "*.strategy_args.strategy_config.masked_softmax_fusion",
            *(
                "*.strategy_args.strategy_config.cross_entropy_loss_fusion",
                "*.strategy_args.strategy_config.moe_shared_expert_overlap",
            ),
            "*.strategy_args.strategy_config.use_batched_model_update",
        ),
        "the engine chooses its kernels",
    ),
    "*.strategy_args.strategy_config.bf16": "model_args.dtype decides",
    "*.strategy_args.strategy_config.distrib_optim_fully_reshardable": "every layout can read every checkpoint",
    "*.strategy_args.strategy_config.tiled_num_shards": ALONE.format("apply_tiled_mlp"),
    "*.use_remove_padding": "use_sequence_packing of strategy_config decides",
    "*.strategy_args.strategy_config.sleep_level": "engines that share devices sleep at level 2 (offload_states)",
    "*.strategy_args.strategy_config.enable_sleep_mode": "offload_states decides",
    "*.strategy_args.strategy_config.variable_seq_lengths": "pipeline stages always tell each other the length",
    "*.strategy_args.strategy_config.overlap_p2p_comm": "it is on where virtual pipeline stages need it",
    "*.strategy_args.strategy_config.moe_router_dtype": "routers always compute in float32",
    # rewards
    "rewards.*.model_args": "rule-based workers hold no model; llm_judge and reward_model name theirs in worker_args",
    "rewards.*.data_args": "rows are routed by domain and tag",
    "rewards.*.strategy_args": "rule-based workers have no engine; llm_judge has worker_args.engine",
    "rewards.*.generating_args": "rule-based workers do not generate; llm_judge has worker_args.max_tokens",
    "rewards.*.device_mapping": "rule-based workers run on the CPU; the models of others have worker_args.device(s)",
    "rewards.*.num_gpus_per_worker": "rule-based workers run on the CPU",
    "rewards.*.name": OVERWRITTEN,
    "rewards.*.response_filter_config": NEVER_READ,
}


@dataclass(frozen=True)
class Later:
    """A feature that is not supported yet. Values in `off` do not request it."""

    feature: str
    off: tuple[Any, ...] = (None, False)


_DISTILLATION = Later("on-policy distillation")
_PG_VARIANT = Later("this name (write policy_loss)", (None, "ppo"))
_CORRECTION = Later("this form (write level, mode, lower_bound and upper_bound)")

NOT_SUPPORTED_YET: dict[str, Later] = {
    "max_ckpt_to_keep": Later("this place (write checkpoint_config.max_ckpt_to_keep)", (None,)),
    "force_disable_old_logprobs_recompute": Later("this name (write enable_old_logprobs_recompute: false)"),
    **dict.fromkeys(
        ("norm_mean_type", "norm_std_type"), Later("separate kinds of reward mean and deviation (use reward_norm)")
    ),
    "whiten_rewards": Later("reward whitening"),
    "rl_loss_coef": Later("weights of several losses", (None, 1)),
    "error_max_len_clip": Later("a clip of the rewards of overlong responses (overlong_buffer_length punishes them)"),
    **dict.fromkeys(("train_infer_correction.is_weight", "train_infer_correction.filters"), _CORRECTION),
    **dict.fromkeys(("pg_variant", "*.pg_variant"), _PG_VARIANT),
    **dict.fromkeys(("*.topr_positive_weight", "*.topr_negative_weight"), Later("weights in TOPR", (None, 1))),
    **dict.fromkeys(
        ("is_pure_opd", "use_opd", "teacher", "student_train", "student_infer", "pure_opd_pipeline_type"), _DISTILLATION
    ),
    "*.opd_kl_coef": _DISTILLATION,
    "sft_train": Later("this name (set pipeline: sft, and write actor_train)"),
    **dict.fromkeys(
        ("prompt_key", "query_key", "response_key", "system_key"),
        Later("other names of columns (rows hold messages, or prompt and response)", (None,)),
    ),
    "is_num_return_sequences_expand": Later("request-level scheduling"),
    "generate_opt_level": Later("request-level scheduling", (None, 0, 1)),
    "user_defined_rollout_loop_cls": Later("rollout loops of your own", (None,)),
    "is_use_additional_prompts": Later("generation ahead of the batch (query_filter_config refills it)"),
    "enable_reference": Later("a reference without a KL term"),
    **dict.fromkeys(
        ("profiler_timeline", "profiler_memory"), Later("this form (write profiler: {torch: {steps: [3, 5]}})")
    ),
    **dict.fromkeys(
        ("tracker_kwargs.api_key", "tracker_kwargs.login_kwargs"),
        Later("a password in a file (set WANDB_API_KEY or SWANLAB_API_KEY in the environment)", (None,)),
    ),
    "tracker_kwargs.tags": Later("this place (write the top-level key tags)", (None,)),
    "rollout_mock": Later("record and replay of rollouts"),
    "rollout_dump_dir": Later("another folder for rollouts (they lie in the run's rollouts/)", (None,)),
    "save_logging_board_dir": Later("dumps of single tokens", (None,)),
    "transfer_backend": Later("lazy transfer of batches", (None,)),
    "*.worker_cls": Later("worker classes of your own for roles", (None,)),
    "*.world_size": Later("this name (write device_mapping, with execution: ray)", (None, 1)),
    "*.system_envs": Later("environment variables of a role (use the top-level system_envs)"),
    "*.model_args.model_type": Later("models other than causal language models", (None,)),
    "*.model_args.num_labels": Later("models other than causal language models", (None, 1)),
    "*.model_args.model_config_kwargs": Later("changes to the model's configuration"),
    "*.model_args.moe_aux_loss_coef": Later("auxiliary losses of routers", (None, 0)),
    "*.model_args.ulysses_size": Later("sequence parallelism of FSDP", (None, 1)),
    **dict.fromkeys(
        ("*.model_args.lora_target", "lora_target"), Later("LoRA here (write actor_train.model_args.lora)", (None,))
    ),
    "*.model_args.adapter_name_or_path": Later("a start from another adapter", (None,)),
    "*.model_args.freeze_module_prefix": Later("frozen modules", (None,)),
    "*.training_args.tf32": Later("a choice of TF32"),
    "*.generating_args.num_beams": Later("beam search", (None, 1)),
    "*.generating_args.repetition_penalty": Later("repetition penalty", (None, 1)),
    "*.generating_args.length_penalty": Later("length penalty", (None, 1)),
    "*.generating_args.stop_strings": Later("stop strings", (None,)),
    "*.generating_args.do_sample": Later("greedy decoding by do_sample (use temperature: 0)", (None, True)),
    "*.generating_args.logprobs": Later("more than the sampled token's log-prob", (None, 0, 1)),
    "*.use_sequence_packing": Later("this place (write strategy_args.strategy_config.use_sequence_packing)"),
    "*.strategy_args.strategy_config.optimizer_cpu_offload": Later(
        "optimizer steps on the host (offload_states moves their state, use_distributed_optimizer shards it)"
    ),
    "*.strategy_args.strategy_config.optimizer_offload_fraction": Later(
        "optimizer steps on the host (offload_states moves their state, use_distributed_optimizer shards it)",
        (None, 0, 1),
    ),
    "*.strategy_args.strategy_config.tp_comm_overlap": Later("buffers of one length (micro-batches differ in length)"),
    "*.strategy_args.strategy_config.use_precision_aware_optimizer": Later("moments in 16 bits (checkpoints hold 32)"),
    "*.strategy_args.strategy_config.recompute_modules": Later(
        "a choice of recomputed modules: most need TransformerEngine (selective recomputes the attention)", (None,)
    ),
    **dict.fromkeys(
        (
            *(
                "*.strategy_args.strategy_config.account_for_embedding_in_pipeline_split",
                "*.strategy_args.strategy_config.account_for_loss_in_pipeline_split",
            ),
            "*.strategy_args.strategy_config.pipeline_model_parallel_layout",
        ),
        Later("pipeline stages of different sizes"),
    ),
    **dict.fromkeys(
        (
            *("*.strategy_args.strategy_config.additional_configs", "*.strategy_args.strategy_config.apply_tiled_mlp"),
            "*.strategy_args.strategy_config.apply_expert_patch",
        ),
        Later("further options of Megatron"),
    ),
    "*.strategy_args.strategy_config.moe_layer_recompute": Later(
        "recomputation of experts alone (recompute_granularity: full recomputes whole layers)"
    ),
    "*.strategy_args.strategy_config.moe_aux_loss_coeff": Later("auxiliary losses of routers", (None, 0)),
    "*.strategy_args.strategy_config.pipeline_parallel_size": Later("pipeline stages in vLLM", (None, 1)),
    "reward_normalization": Later("means and deviations over these samples (reward_norm: group, batch or running)"),
    "reward_model": Later("a judge in a cluster of the run (judge_model_type: inference starts a server)", (None,)),
    "*.apply_loss_scale": Later("other loss scales", (None, True)),
    **dict.fromkeys(
        ("actor_infer.router_replay", "reference.router_replay", "critic.router_replay"),
        Later("this place (write actor_train.router_replay)", (None, False, "disable")),
    ),
    "*.mtp_training_mode": Later("multi-token prediction", (None, "disabled")),
    "*.model_update_frequency": Later("rarer weight transfer", (None, 1)),
    "rewards.*.response_length_penalty_coef": Later(
        "length shaping by this key (worker_cls: length does it)", (None, 0)
    ),
    "rewards.*.reward_manager_config": Later("remote reward systems"),
    "rewards.*.system_envs": Later("environment variables of a role (use the top-level system_envs)"),
    "rewards.*.judge_api_key": Later(
        "a password in a file (name an environment variable: worker_args.api_key_env)", (None,)
    ),
    "rewards.*.code_url": Later("code execution elsewhere (code_sandbox runs programs on this machine)", (None,)),
    "rewards.*.use_local": Later("code execution elsewhere (code_sandbox runs programs on this machine)", (None, True)),
}

LATER_VALUES: dict[str, dict[str, str]] = {
    "adv_estimator": dict.fromkeys(("gigpo", "step_reinforce", "agentic_reinforce"), "this estimator (see credit)"),
    "pipeline": {
        "evaluate": "this name (write python -m roll_gspo.evaluate)",
        "agentic": "multi-turn rollouts",
    },
}


# (role, phase) of `use_dynamic_batching_in_*`. The switch is replaced by `max_tokens_per_microbatch_in_*` if it is on.
DYNAMIC_BATCHING = (
    *(("actor_train", "train"), ("actor_train", "infer")),
    *(("critic", "train"), ("critic", "infer")),
    ("reference", "infer"),
)

# Keys that ROLL's example files set without effect, with the (key, value) that would make them effective.
IGNORED_WITHOUT: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("value_clip", "lambd"), ("adv_estimator", "gae")),
    "init_kl_coef": ("add_token_level_kl", True),
    **dict.fromkeys(("difficulty_low_threshold", "difficulty_high_threshold"), ("difficulty_mask", True)),
}


@dataclass(frozen=True)
class Sifted:
    """A configuration without ignored and unsupported ROLL keys, with the warnings and problems of those keys."""

    values: dict[str, Any]
    warnings: tuple[tuple[str, str], ...]
    """Pairs of key path and reason why the key is ignored."""
    refusals: tuple[Problem, ...]


def sift(values: dict[str, Any]) -> Sifted:
    """Take the keys of both tables out of composed YAML.

    An ignored key gives a warning. A key of an unsupported feature is a problem, unless its value is 'off'.
    """
    warnings: list[tuple[str, str]] = []
    refusals: list[Problem] = []
    values = _without_switches(values, warnings, refusals)

    def visit(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        kept = {}
        for key, value in node.items():
            path = f"{prefix}{key}"
            reason = _lookup(IGNORED, path) or _without_reader(values, path)
            later = _lookup(NOT_SUPPORTED_YET, path)
            if reason is not None:
                if value is not None:
                    warnings.append((path, reason))
            elif later is not None:
                if not _is_off(value, later.off):
                    shown = f" (value {value!r})" if _is_fit_to_print(key, value) else ""
                    refusals.append(Problem(path, f"not supported yet: {later.feature}{shown}"))
            elif isinstance(value, dict):
                kept[key] = visit(value, f"{path}.")
            else:
                kept[key] = value
        return kept

    kept = visit(values, "")
    return Sifted(kept, tuple(warnings), tuple(refusals))


def _without_switches(
    values: dict[str, Any], warnings: list[tuple[str, str]], refusals: list[Problem]
) -> dict[str, Any]:
    """Remove the switches of dynamic batching. ROLL has a switch and a budget; here, the budget alone turns it on."""
    values = dict(values)
    for role, phase in DYNAMIC_BATCHING:
        switch, budget = f"use_dynamic_batching_in_{phase}", f"max_tokens_per_microbatch_in_{phase}"
        block = values.get(role)
        if not isinstance(block, dict) or switch not in block:
            continue
        values[role] = block = dict(block)
        is_on = block.pop(switch)
        if is_on and not block.get(budget):
            refusals.append(Problem(f"{role}.{switch}", f"true needs {budget}; add it"))
        elif not is_on and block.pop(budget, None):
            warnings.append((f"{role}.{budget}", f"{switch}: false switches it off (GPUs choose one)"))
    return values


def reader_text(key: str, value: Any) -> str:
    """Return why a key of `IGNORED_WITHOUT` is ignored if `key` has another value."""
    return f"it acts with {key}: {'true' if value is True else value} only"


def _without_reader(values: dict[str, Any], path: str) -> str | None:
    if path not in IGNORED_WITHOUT:
        return None
    key, value = IGNORED_WITHOUT[path]
    says_nothing = values[path] == AlgorithmConfig.model_fields[path].default  # a run's config.yaml lists them
    # The schema checks whether a user's function reads the key.
    is_read = values.get(key) == value or (key in EXTENSIBLE and is_dotted_path(str(values.get(key))))
    return None if says_nothing or is_read else reader_text(key, value)


def _is_fit_to_print(key: str, value: Any) -> bool:
    return not isinstance(value, dict | list) and not key.endswith(("_key", "token", "password"))


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    """Return whether a value is off. A block is off if its switch is, or without a switch, if all its values are."""
    if isinstance(value, dict):
        switches = [value[key] for key in ("enable", "enabled") if key in value]
        return all(_is_off(item, off) for item in switches or value.values())
    if isinstance(value, list):
        return all(_is_off(item, off) for item in value)
    return value in off


def _lookup(table: dict[str, Any], path: str) -> Any:
    head, _, rest = path.partition(".")
    if head == "rewards" and "." in rest:
        rest = "*." + rest.partition(".")[2]
    return table.get(path) or table.get(f"{'*' if head in ROLES else head}.{rest}")
