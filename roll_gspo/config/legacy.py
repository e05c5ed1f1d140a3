"""Keys of ROLL that mean nothing here, or that a later version will honour. Every other unknown key is an error.

Both tables are matched against the dotted key path, `*` standing for one name.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

IGNORED: dict[str, str] = {
    "*.data_args.dataset_dir": "ROLL never reads it; file_name is a path as it stands",
    "*.data_args.interleave_probs": "ROLL never reads it",
    "*.data_args.preprocessing_num_workers": "prompts are tokenized once, in this process",
    "*.data_args.prompt": "columns are recognised by name: messages, prompt or question",
    "*.data_args.messages": "columns are recognised by name: messages, prompt or question",
    "actor_infer.data_args": "prompts come from actor_train.data_args",
    "reference.data_args": "the reference scores what actor_infer generated",
    "reference.generating_args": "the reference does not generate",
    "actor_infer.infer_batch_size": "max_num_seqs of strategy_config decides how many are decoded together",
    "actor_infer.training_args": "the generation engine does not train",
    "reference.training_args": "the reference does not train",
    "actor_train.generating_args": "actor_infer.generating_args decides how responses are sampled",
    "*.model_args.flash_attn": "ROLL never reads it",
    "*.model_args.disable_gradient_checkpointing": "recompute_granularity of strategy_config decides",
    "*.training_args.num_train_epochs": "it has no effect in ROLL either; max_steps and ppo_epochs decide",
    "*.training_args.dataloader_num_workers": "there is no data loader: rollouts are already in memory",
    "validation.eval_steps": "ROLL never reads it; the top-level eval_steps decides",
    "rewards.*.model_args": "rule-based workers hold no model",
    "rewards.*.data_args": "rows are routed by domain and tag",
    "rewards.*.infer_batch_size": "samples are scored one by one, each with its own timeout",
    "rewards.*.strategy_args": "rule-based workers have no engine",
    "rewards.*.device_mapping": "rule-based workers run on the CPU",
    "rpc_timeout": "roles live in this process; rewards have timeout_s",
    "base_dir": "ROLL never reads it here",
    "num_nodes": "device_mapping and num_gpus_per_node decide",
    "reward_pretrain": "no shipped reward worker holds a model yet",
    "checkpoint_config.type": "checkpoints are folders on a file system",
    "checkpoint_config.async_upload": "checkpoints are written in place and renamed when complete",
    "offload_nccl": "ROLL overwrites it",
    "model_download_type": "transformers reads the Hugging Face hub, or a local folder",
    "hydra": "Hydra's own block",
}


@dataclass(frozen=True)
class Later:
    """A feature that this version lacks; `off` are the values that do not ask for it."""

    feature: str
    off: tuple[Any, ...] = (None, False)


NOT_SUPPORTED_YET: dict[str, Later] = {
    "critic": Later("a value model"),
    "critic_warmup": Later("a value model", (None, 0)),
    "value_clip": Later("a value model"),
    "lambd": Later("generalised advantage estimation"),
    "whiten_rewards": Later("reward whitening"),
    "norm_mean_type": Later("separate kinds of reward mean and deviation (use reward_norm)"),
    "norm_std_type": Later("separate kinds of reward mean and deviation (use reward_norm)"),
    "rl_loss_coef": Later("weights of several losses", (None, 1, 1.0)),
    "max_len_mask": Later("sample masks"),
    "difficulty_mask": Later("sample masks"),
    "difficulty_low_threshold": Later("sample masks", (None, 0, 0.0)),
    "difficulty_high_threshold": Later("sample masks", (None, 1, 1.0)),
    "error_max_len_clip": Later("sample masks"),
    "error_max_len_threshold": Later("sample masks", (None, 9999999999)),
    "difficulty_loss_weight": Later("sample weights"),
    "length_loss_weight": Later("sample weights"),
    "train_infer_correction": Later("correction of the trainer/engine mismatch"),
    "policy_loss": Later("objectives other than the clip", (None, "clip")),
    "postive_loss_coef": Later("objectives other than the clip"),
    "positive_loss_coef": Later("objectives other than the clip"),
    "use_topr_neg_loss_coef": Later("objectives other than the clip"),
    "async_generation_ratio": Later("asynchronous generation", (None, 0, 0.0)),
    "is_num_return_sequences_expand": Later("request-level scheduling"),
    "is_use_additional_prompts": Later("dynamic sampling"),
    "max_additional_running_prompts": Later("dynamic sampling"),
    "max_running_requests": Later("request-level scheduling"),
    "generate_opt_level": Later("request-level scheduling", (None, 0, 1)),
    "query_filter_config": Later("dynamic sampling"),
    "rewards.*.query_filter_config": Later("dynamic sampling"),
    "rewards.*.reward_type": Later("soft and hard reward variants"),
    "rewards.*.judge_prompt": Later("judge models"),
    "rewards.*.judge_model_type": Later("judge models"),
    "rewards.*.judge_model_name": Later("judge models"),
    "rewards.*.judge_api_url": Later("judge models"),
    "rewards.*.judge_api_key": Later("judge models"),
    "rewards.*.code_url": Later("code execution"),
    "rewards.*.use_local": Later("code execution"),
    "rewards.*.format_pattern": Later("format rewards"),
    "global_template": Later("named chat templates"),
    "tag_to_template": Later("named chat templates", (None, {})),
    "*.data_args.domain_interleave_probs": Later("mixing of domains"),
    "*.data_args.dataset_type": Later("formats other than JSON", (None, "json")),
    "*.model_args.model_type": Later("models other than causal language models"),
    "*.model_args.lora_target": Later("LoRA"),
    "*.model_args.lora_rank": Later("LoRA"),
    "*.model_args.lora_alpha": Later("LoRA"),
    "*.model_args.attn_implementation": Later("a choice of attention kernel per role"),
    "*.model_args.freeze_module_prefix": Later("frozen modules"),
    "*.generating_args.num_beams": Later("beam search", (None, 1)),
    "*.generating_args.repetition_penalty": Later("repetition penalty", (None, 1, 1.0)),
    "*.generating_args.stop_strings": Later("stop strings"),
    "*.generating_args.do_sample": Later("greedy decoding by do_sample (use temperature: 0)", (None, True)),
    "*.generating_args.logprobs": Later("more than the sampled token's log-prob", (None, 0, 1)),
    "*.use_dynamic_batching_in_train": Later("batching by token budget"),
    "*.use_dynamic_batching_in_infer": Later("batching by token budget"),
    "*.max_tokens_per_microbatch_in_train": Later("batching by token budget"),
    "*.max_tokens_per_microbatch_in_infer": Later("batching by token budget"),
    "*.use_sequence_packing": Later("sequence packing"),
    "*.router_replay": Later("routing replay"),
    "*.pg_variant": Later("objectives other than the clip"),
    "*.model_update_frequency": Later("rarer weight transfer", (None, 1)),
    "actor_train.worker_cls": Later("worker classes of your own for roles"),
    "actor_infer.worker_cls": Later("worker classes of your own for roles"),
    "reference.worker_cls": Later("worker classes of your own for roles"),
    "model_update_buffer_size_mb": Later("bucketed weight transfer"),
    "enable_reference": Later("a reference without a KL term"),
    "max_restarts": Later("automatic restarts"),
    "profiler_timeline": Later("profiling"),
    "profiler_memory": Later("profiling"),
    "rollout_mock": Later("record and replay of rollouts"),
    "rollout_dump_dir": Later("another folder for rollouts (they lie in the run's rollouts/)"),
}

LATER_VALUES: dict[str, dict[str, str]] = {
    "adv_estimator": dict.fromkeys(
        ("gae", "rloo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"), "this estimator"
    ),
    "importance_sampling": {"segment": "a ratio per assistant turn"},
    "pipeline": {"sft": "supervised training", "evaluate": "evaluation alone", "agentic": "multi-turn rollouts"},
    "track_with": dict.fromkeys(("wandb", "mlflow", "swanlab", "trackio"), "this tracker"),
}


@dataclass(frozen=True)
class Sifted:
    """A configuration without ROLL's foreign keys, the warnings they give, and what is refused."""

    values: dict[str, Any]
    warnings: tuple[str, ...]
    refusals: tuple[tuple[str, str], ...]
    """(key path, message)"""


def sift(values: dict[str, Any]) -> Sifted:
    """Take the keys of both tables out of composed YAML.

    An ignored key gives a warning; one that asks for a missing feature is refused, unless its value says 'off'.
    """
    warnings: list[str] = []
    refusals: list[tuple[str, str]] = []

    def visit(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        kept = {}
        for key, value in node.items():
            path = f"{prefix}{key}"
            reason = _lookup(IGNORED, path)
            later = _lookup(NOT_SUPPORTED_YET, path)
            if reason is not None:
                if path != "hydra":
                    warnings.append(f"{path}: ignored: {reason}; delete it")
            elif later is not None:
                if value not in later.off:
                    refusals.append((path, f"not supported yet: {later.feature} (value {value!r})"))
            elif isinstance(value, dict):
                kept[key] = visit(value, f"{path}.")
            else:
                kept[key] = value
        return kept

    return Sifted(visit(values, ""), tuple(warnings), tuple(refusals))


def _lookup(table: dict[str, Any], path: str) -> Any:
    if path in table:
        return table[path]
    depth = path.count(".")
    matches = (p for p in table if "*" in p and p.count(".") == depth and fnmatch.fnmatchcase(path, p))
    return next((table[p] for p in matches), None)
