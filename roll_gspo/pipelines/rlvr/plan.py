"""Plan rows of reinforcement learning, and sequences that exceed the context of the model."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.selection import QueryFilterConfig
from roll_gspo.declarations import EXTENSIBLE, POLICY_LOSSES
from roll_gspo.models.size import context_length_of
from roll_gspo.pipelines.devices import finds_cuda, model_of
from roll_gspo.pipelines.pipeline import mini_batch_text
from roll_gspo.pipelines.rlvr.ratio_noise import noise_texts
from roll_gspo.pipelines.rlvr.waiting import async_texts
from roll_gspo.pipelines.weight_transfer import transfer_text

_BASE = "actor_train without its adapter"


def plan_rows(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yield (label, text) pairs."""
    if not config.needs_reference:
        yield "roles", f"{'reference':<12} not built: no KL term is switched on"
    elif config.reference_is_base:
        yield "roles", f"{'reference':<12} not built: {_BASE} has its log-probs"
    if config.critic is not None and config.needs_critic:
        yield "roles", f"{'critic':<12} learning rate {config.critic.training_args.learning_rate:g}"
    elif config.critic is not None:
        yield "roles", f"{'critic':<12} not built: adv_estimator is {config.adv_estimator}, not gae"
    yield "weights", transfer_text(config, finds_cuda(config))
    yield "rollout", _rollout_text(config)
    yield from (("async", text) for text in async_texts(config))
    yield "updates", _updates_text(config)
    yield "ratio", _ratio_text(config)
    yield from (("noise", text) for text in noise_texts(config))
    yield "rewards", _rewards_text(config)
    yield from (("samples", text) for text in _sample_texts(config))
    yield "log-probs", _log_probs_text(config)
    yield from (("log-probs", text) for text in _correction_texts(config))


def _rollout_text(config: ExperimentConfig) -> str:
    return (
        f"{config.rollout_batch_size} prompts × {config.num_return_sequences_in_group} samples = "
        f"{config.samples_per_rollout}; prompt ≤ {config.prompt_length}, response ≤ {config.max_response_length} tokens"
    )


def _updates_text(config: ExperimentConfig) -> str:
    return (
        f"{config.samples_per_rollout} samples × {config.ppo_epochs} epoch(s) → {mini_batch_text(config)} → "
        f"{config.updates_per_rollout} optimizer steps per rollout, {config.num_updates} in all"
    )


def _ratio_text(config: ExperimentConfig) -> str:
    """Return ratio, policy loss, aggregation and estimator, each with the settings that it reads."""
    parts = [_selected_text(config, "importance_sampling"), _selected_text(config, "policy_loss")]
    if config.clip_range is not None:
        low, high = config.clip_range
        parts[-1] += f" {low:g}/{high:g} (to {_bounds_text(config, low, high)}; {config.clip_range_origin})"
    if POLICY_LOSSES.declaration(config.policy_loss).allows_dual_clip:
        dual = config.effective_dual_clip_ratio
        origin = " (1 + 2 * pg_clip)" if config.dual_clip_ratio is None else ""
        parts.append(f"dual clip {dual:g}{origin}" if dual else "no dual clip")
    return ", ".join([*parts, config.loss_agg_mode, _selected_text(config, "adv_estimator")])


def _bounds_text(config: ExperimentConfig, low: float, high: float) -> str:
    """Return the interval to which the ratio is clipped, by the number n of tokens if it depends on the length."""
    if config.policy_loss == "fspo":
        return f"[exp(-{low:g} √n), exp({high:g} √n)]"
    if config.pg_clip_length_scaling:
        return f"[exp(-{low:g}/√n), exp({high:g}/√n)]"
    return f"[{1 - low:g}, {1 + high:g}]"


def _selected_text(config: ExperimentConfig, key: str) -> str:
    """Return `name (key value, ...)` of the function that a key selects."""
    name: str = getattr(config, key)
    reads = EXTENSIBLE[key].declaration(name).reads
    read = {key: value for key in reads if (value := getattr(config, key)) is not False}
    read |= getattr(config, f"{key}_args")
    texts = (f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in read.items())
    return f"{name} ({', '.join(texts)})" if read else name


def _sample_texts(config: ExperimentConfig) -> Iterator[str]:
    """Yield the enabled filters, penalties, masks and weights of samples."""
    filters = {domain: _filter_text(block) for domain, block in config.query_filters.items()}
    one = len(set(filters.values())) == 1 and len(filters) == len(config.domain_tags)
    for domain, kept in [("", next(iter(filters.values())))] if one else filters.items():
        whose = f"{domain}: groups" if domain else "groups"
        limit = f"at most {config.max_sampling_rounds} × rollout_batch_size prompts per step"
        yield f"{whose} whose {kept} stay, others are replaced; {limit}"
    if config.overlong_buffer_length is not None:
        last = config.overlong_buffer_length
        first, penalty = config.max_response_length - last, config.overlong_penalty_factor
        yield f"responses over {first} tokens lose up to {penalty:g} of their score (overlong_buffer_length {last})"
    masks = ["responses cut at the limit"] if config.max_len_mask else []
    if config.difficulty_mask:
        low, high = config.difficulty_low_threshold, config.difficulty_high_threshold
        masks.append(f"groups with a mean score outside ({low:g}, {high:g})")
    if masks:
        yield f"not in the loss: {', '.join(masks)}"
    if config.off_policy_mask_threshold is not None:
        limit = config.off_policy_mask_threshold
        yield f"not in the policy loss: negative advantages with a KL per token above {limit:g} since generation"
    if config.top_entropy_quantile < 1:
        yield f"in the policy loss: the fraction {config.top_entropy_quantile:g} of tokens with the highest entropy"
    if config.length_loss_weight:
        yield "weighted by length: short responses count more"
    if config.difficulty_loss_weight:
        yield "weighted by the difficulty of the data row: hard prompts count more"


def _filter_text(query_filter: QueryFilterConfig) -> str:
    args = query_filter.filter_args
    if query_filter.type == "mean_filter":
        return f"mean score is between {args.threshold_down:g} and {args.threshold_up:g}"
    return f"scores deviate by more than {args.std_threshold:g}"


def _correction_texts(config: ExperimentConfig) -> Iterator[str]:
    """Yield the gate and the enabled corrections of the mismatch between trainer and engine."""
    gate = config.mismatch_gate
    if gate is not None:
        yield f"gate: {gate.action} if KL(engine || trainer) is above {gate.max_kl:g} before the first update"
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
    manager, agent = config.train_env_manager, config.agent
    if agent is not None:
        return (
            f"episodes of {agent.command}, at most {agent.max_requests} answers, {agent.max_concurrent} at once, "
            f"{agent.timeout_s:g} s per episode"
        )
    if manager is not None:
        at_once = manager.num_workers * manager.episodes_per_worker
        return "; ".join(
            f"{name}: episodes of {e.env_type}, at most {e.max_steps} answers, {at_once} at once in "
            f"{manager.num_workers} processes, {e.timeout_s:g} s per answer"
            for name, e in config.played_environments.items()
        )
    return "; ".join(
        f"{name}: {r.title} × {r.num_workers}, {r.timeout_s:g} s per sample" for name, r in config.rewards.items()
    )


def _log_probs_text(config: ExperimentConfig) -> str:
    trainer = config.actor_train.strategy_args.strategy_name
    engine = config.actor_infer.strategy_args.strategy_name
    old = f"recomputed by {trainer}" if config.enable_old_logprobs_recompute else f"those of {engine}"
    reference = "none"
    if config.reference_is_base:
        reference = _BASE
    elif config.needs_reference and config.reference is not None:
        reference = config.reference.strategy_args.strategy_name
    return f"old: {old}; reference: {reference}; at temperature {config.actor_infer.generating_args.temperature:g}"


def context_problems(config: ExperimentConfig, model: str | None = None) -> Iterator[Problem]:
    """Yield sequence lengths that exceed the model's context.

    Args:
        config: the whole configuration.
        model: name or folder, if it is not the model that training starts from.
    """
    name = model or model_of(config, config.actor_train)
    context = context_length_of(name)
    training = config.max_sequence_length
    validation = config.validation_prompt_length + config.validation_response_length if config.validation else 0
    if context is not None and model is None and training > context:
        yield Problem(
            "response_length",
            f"prompt_length {config.prompt_length} + response_length {config.max_response_length} are {training} "
            f"tokens, but the context of {name} has {context}; lower one",
        )
    elif context is not None and validation > context:
        yield Problem(
            "val_sequence_length",
            f"prompts of {config.validation_prompt_length} and responses of {config.validation_response_length} tokens "
            f"in validation are {validation}, but the context of {name} has {context}; lower val_prompt_length or "
            "validation.generating_args.max_new_tokens",
        )
