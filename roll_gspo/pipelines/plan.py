"""The plan of a run, printed before anything heavy starts: who runs where, how batches divide, what to beware of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import roll_gspo
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.selection import QueryFilterConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.models.size import ModelSize, context_length_of, size_of
from roll_gspo.pipelines.devices import device_problems, finds_cuda, layout_text, roles_of
from roll_gspo.pipelines.memory import memory_texts, memory_warnings
from roll_gspo.pipelines.warnings import warnings_of


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        title: head line.
        rows: (label, text) pairs.
        warnings: settings that run but are probably not what was meant, each with its way out.
        not_runnable: settings that this version describes but cannot run.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    not_runnable: tuple[str, ...]

    def text(self) -> str:
        """The plan as it is printed and kept in `plan.txt`."""
        lines = [self.title]
        previous = ""
        for label, text in self.rows:
            lines.append(f"  {label if label != previous else '':<11} {text}")
            previous = label
        lines += [f"  {'warning':<11} {w}" for w in self.warnings]
        lines += [f"  {'cannot run':<11} {w}" for w in self.not_runnable]
        return "\n".join(lines)


def make_plan(config: AnyConfig, config_warnings: tuple[str, ...] = ()) -> Plan:
    """Work out the plan of a valid configuration, as this machine would run it."""
    size, on_cuda = size_of(config.pretrain), finds_cuda(config)
    is_sft = isinstance(config, SftConfig)
    rows = [
        ("model", _model_text(config, size)),
        *_role_rows(config),
        *(_sft_rows(config) if is_sft else _rlvr_rows(config)),
        *(("memory", text) for text in memory_texts(config)),
        ("run", _sft_run_text(config) if is_sft else _run_text(config)),
    ]
    title = f"roll_gspo {roll_gspo.__version__}: plan of {config.exp_name}"
    warnings = (*warnings_of(config), *memory_warnings(config, on_cuda), *config_warnings)
    too_long = _sft_context_problems(config) if isinstance(config, SftConfig) else context_problems(config)
    return Plan(title, tuple(rows), warnings, (*_of_replay(config, size), *too_long, *device_problems(config, on_cuda)))


def _rlvr_rows(config: ExperimentConfig) -> list[tuple[str, str]]:
    return [
        ("rollout", _rollout_text(config)),
        ("updates", _updates_text(config)),
        ("ratio", _ratio_text(config)),
        ("rewards", _rewards_text(config)),
        *(("samples", text) for text in _sample_texts(config)),
        ("log-probs", _log_probs_text(config)),
        *(("log-probs", text) for text in _correction_texts(config)),
    ]


def _sft_rows(config: SftConfig) -> list[tuple[str, str]]:
    data = config.actor_train.data_args
    turns = "the last turn of a sequence" if data.multi_turn == "separate" else "all assistant's turns of a sequence"
    rows = f" (the first {data.num_rows})" if data.num_rows else ""
    return [
        ("data", f"{', '.join(data.file_name)}{rows}; sequences ≤ {config.sequence_length} tokens"),
        ("updates", f"a step is one optimizer step: {_mini_batch_text(config)}"),
        ("loss", f"negative log-likelihood, mean over the tokens of {turns}"),
    ]


def _model_text(config: AnyConfig, size: ModelSize | None) -> str:
    count = "size unknown until it is read"
    if size is not None:
        count = f"{_count(size.num_parameters)} parameters ({size.source})"
    warm = config.warm_start
    start = f"; warm start of {warm.steps} steps, cached" if warm else ""
    return f"{config.pretrain}, {count}, {config.actor_train.model_args.dtype}{start}"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _role_rows(config: AnyConfig) -> list[tuple[str, str]]:
    rows = [
        ("roles", f"{name:<12} {role.strategy_args.strategy_name:<15} {layout_text(config, role)}")
        for name, role in roles_of(config).items()
    ]
    if isinstance(config, SftConfig):
        return rows
    if not config.needs_reference:
        rows.append(("roles", f"{'reference':<12} not built: no KL term is switched on"))
    if config.critic is not None and not config.needs_critic:
        rows.append(("roles", f"{'critic':<12} not built: adv_estimator is {config.adv_estimator}, not gae"))
    return rows


def _rollout_text(config: ExperimentConfig) -> str:
    return (
        f"{config.rollout_batch_size} prompts × {config.num_return_sequences_in_group} samples = "
        f"{config.samples_per_rollout}; prompt ≤ {config.prompt_length}, response ≤ {config.max_response_length} tokens"
    )


def _updates_text(config: ExperimentConfig) -> str:
    return (
        f"{config.samples_per_rollout} samples × {config.ppo_epochs} epoch(s) → {_mini_batch_text(config)} → "
        f"{config.updates_per_rollout} optimizer steps a rollout, {config.num_updates} in all"
    )


def _mini_batch_text(config: AnyConfig) -> str:
    args, budget = config.actor_train.training_args, config.actor_train.max_tokens_per_microbatch_in_train
    cut = f"{args.gradient_accumulation_steps} micro-batch(es) of {args.per_device_train_batch_size}"
    if budget is not None:
        cut = f"{args.mini_batch_size_per_rank} in micro-batches of up to {budget} tokens"
    return f"mini-batches of {config.mini_batch_size} ({cut} × DP {config.data_parallel_size})"


def _ratio_text(config: ExperimentConfig) -> str:
    dual = config.effective_dual_clip_ratio
    parts = [config.importance_sampling, _objective_text(config)]
    if config.policy_loss == "clip":
        parts.append(f"dual clip {dual:g}" if dual else "no dual clip")
    return ", ".join([*parts, config.loss_agg_mode, config.adv_estimator])


def _objective_text(config: ExperimentConfig) -> str:
    if config.policy_loss == "sapo":
        return f"sapo, gate temperatures {config.sapo_tau_positive:g}/{config.sapo_tau_negative:g}"
    if config.clip_range is None:
        return config.policy_loss
    low, high = config.clip_range
    return f"{config.policy_loss} {low:g}/{high:g} (to [{1 - low:g}, {1 + high:g}])"


def _sample_texts(config: ExperimentConfig) -> Iterator[str]:
    """What is left out, replaced, punished or weighed; nothing where nothing is switched on."""
    filters = {domain: _filter_text(block) for domain, block in config.query_filters.items()}
    one = len(set(filters.values())) == 1 and len(filters) == len(config.rewards)
    for domain, kept in [("", next(iter(filters.values())))] if one else filters.items():
        whose = f"{domain}: groups" if domain else "groups"
        yield f"{whose} whose {kept} stay, others are replaced; {config.max_sampling_rounds} generations a step at most"
    if config.overlong_buffer_length is not None:
        first = config.max_response_length - config.overlong_buffer_length
        yield f"responses over {first} tokens lose up to {config.overlong_penalty_factor:g} of their score"
    masks = ["responses cut at the limit"] if config.max_len_mask else []
    if config.difficulty_mask:
        low, high = config.difficulty_low_threshold, config.difficulty_high_threshold
        masks.append(f"groups with a mean score outside ({low:g}, {high:g})")
    if masks:
        yield f"not in the loss: {', '.join(masks)}"
    if config.length_loss_weight:
        yield "weighed by length: short responses count more"
    if config.difficulty_loss_weight:
        yield "weighed by the difficulty of the data row: hard prompts count more"


def _filter_text(query_filter: QueryFilterConfig) -> str:
    args = query_filter.filter_args
    if query_filter.type == "mean_filter":
        return f"mean score is between {args.threshold_down:g} and {args.threshold_up:g}"
    return f"scores deviate by more than {args.std_threshold:g}"


def _correction_texts(config: ExperimentConfig) -> Iterator[str]:
    """What is done about trainer and engine not being the same; nothing where nothing is switched on."""
    correction, replay = config.train_infer_correction, config.actor_train.router_replay
    if correction is not None:
        bounds = f"[{correction.lower_bound:g}, {correction.upper_bound:g}]"
        verb = "clamped to" if correction.mode == "truncate" else "0 outside"
        yield f"correction: {correction.level} weights of trainer over engine, {verb} {bounds}"
    if replay.mode != "disable":
        chooser = "recomputed the old log-probs" if replay.mode == "R2" else "sampled"
        yield f"routing replay {replay.mode}: updates use the experts chosen by the pass that {chooser}"
    elif replay.record:
        engine = config.actor_infer.strategy_args.strategy_name
        yield f"routing: the experts that {engine} chose are compared with the trainer's, none is replayed"


def _rewards_text(config: ExperimentConfig) -> str:
    return "; ".join(
        f"{name}: {r.title} × {r.num_workers}, {r.timeout_s:g} s a sample" for name, r in config.rewards.items()
    )


def _log_probs_text(config: ExperimentConfig) -> str:
    trainer = config.actor_train.strategy_args.strategy_name
    engine = config.actor_infer.strategy_args.strategy_name
    old = f"recomputed by {trainer}" if config.enable_old_logprobs_recompute else f"those of {engine}"
    reference = "none"
    if config.needs_reference and config.reference is not None:
        reference = config.reference.strategy_args.strategy_name
    return f"old: {old}; reference: {reference}; at temperature {config.actor_infer.generating_args.temperature:g}"


def _run_text(config: ExperimentConfig) -> str:
    warmup = f" ({config.critic_warmup} of the critic alone)" if config.critic_warmup else ""
    return f"{config.max_steps} steps{warmup}, {_habits_text(config)}"


def _sft_run_text(config: SftConfig) -> str:
    steps = f"{config.max_steps} steps" if config.max_steps is not None else ""
    epochs = f"{config.num_epochs} pass(es) over the data" if config.num_epochs is not None else ""
    length = f"{steps} or {epochs}, whichever is over first" if steps and epochs else steps or epochs
    return f"{length}, {_habits_text(config)}"


def _habits_text(config: AnyConfig) -> str:
    validation = f"validation before, every {config.eval_steps} and after" if config.validation else "no validation"
    resume = f", resume: {config.resume_from_checkpoint}" if config.resume_from_checkpoint else ""
    saved = f"checkpoint every {config.save_steps}"
    if config.checkpoint_config.keep_best is not None:
        saved += f" and at the best {config.checkpoint_config.keep_best}"
    return f"{saved}, {validation}, seed {config.seed}{resume}"


def context_problems(config: ExperimentConfig, model: str | None = None) -> Iterator[str]:
    """Sequences that are longer than the model's context.

    Args:
        config: the whole configuration.
        model: name or folder, where it is not the one that training starts from.
    """
    name = model or config.actor_train.model_args.model_name_or_path or config.pretrain
    context = context_length_of(name)
    training = config.max_sequence_length
    validation = config.validation_prompt_length + config.validation_response_length if config.validation else 0
    if context is not None and model is None and training > context:
        yield (
            f"response_length: prompt_length {config.prompt_length} + response_length {config.max_response_length} are "
            f"{training} tokens, but the context of {name} has {context}; lower one"
        )
    elif context is not None and validation > context:
        yield (
            f"val_sequence_length: prompts of {config.validation_prompt_length} and responses of "
            f"{config.validation_response_length} tokens in validation are {validation}, but the context of {name} has "
            f"{context}; lower val_prompt_length or validation.generating_args.max_new_tokens"
        )


def _sft_context_problems(config: SftConfig) -> Iterator[str]:
    name = config.actor_train.model_args.model_name_or_path or config.pretrain
    context = context_length_of(name)
    if context is not None and config.sequence_length > context:
        yield (
            f"sequence_length: {config.sequence_length} tokens, but the context of {name} has {context}; lower it to "
            "that (longer conversations are dropped)"
        )


def _of_replay(config: AnyConfig, size: ModelSize | None) -> Iterator[str]:
    """Routing replay of a model that has no routers."""
    replay = config.actor_train.router_replay
    is_dense = size is not None and size.source != "from its name" and not size.num_expert_parameters
    if (replay.mode != "disable" or replay.record) and is_dense:
        yield (
            f"actor_train.router_replay: {config.pretrain} has no experts to replay; choose a mixture of experts "
            "(model=tiny_qwen3_moe), or router_replay=none"
        )
