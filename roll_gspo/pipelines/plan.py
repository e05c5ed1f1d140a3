"""The plan of a run, printed before anything heavy starts: who runs where, how batches divide, what to beware of."""

from __future__ import annotations

from dataclasses import dataclass

import roll_gspo
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.strategy import MegatronInferArgs, MegatronTrainArgs, VllmArgs
from roll_gspo.models.size import ModelSize, size_of

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2}
TOKEN_SCALE_CLIP = 0.01  # ratios of single tokens move by tenths, those of sequences by thousandths
GIB = 2**30


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


def make_plan(config: ExperimentConfig, config_warnings: tuple[str, ...] = ()) -> Plan:
    """Work out the plan of a valid configuration."""
    size = size_of(config.pretrain)
    rows = [
        ("model", _model_text(config, size)),
        *_role_rows(config),
        ("rollout", _rollout_text(config)),
        ("updates", _updates_text(config)),
        ("ratio", _ratio_text(config)),
        ("rewards", _rewards_text(config)),
        ("log-probs", _log_probs_text(config)),
        ("memory", _memory_text(config, size)),
        ("run", _run_text(config)),
    ]
    title = f"roll_gspo {roll_gspo.__version__}: plan of {config.exp_name}"
    return Plan(title, tuple(rows), tuple(_warnings(config)) + config_warnings, tuple(_not_runnable(config)))


def _model_text(config: ExperimentConfig, size: ModelSize | None) -> str:
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


def _role_rows(config: ExperimentConfig) -> list[tuple[str, str]]:
    roles = [("actor_train", config.actor_train), ("actor_infer", config.actor_infer)]
    if config.needs_reference and config.reference is not None:
        roles.append(("reference", config.reference))
    rows = []
    for name, role in roles:
        args = role.strategy_args
        devices = _devices_text(role.device_mapping, config.num_gpus_per_node)
        layout = ""
        if isinstance(args, MegatronTrainArgs | MegatronInferArgs):
            c = args.strategy_config
            ranks = len(role.device_mapping or (0,))
            layout = (
                f", TP {c.tensor_model_parallel_size} · PP {c.pipeline_model_parallel_size} · CP "
                f"{c.context_parallel_size} · EP {c.expert_model_parallel_size} · DP {ranks // c.model_parallel_size}"
            )
        elif isinstance(args, VllmArgs):
            tensor = args.strategy_config.tensor_parallel_size
            layout = f", TP {tensor} · {len(role.device_mapping or (0,)) // tensor or 1} engine(s)"
        rows.append(("roles", f"{name:<12} {args.strategy_name:<15} {devices}{layout}"))
    if not config.needs_reference:
        rows.append(("roles", f"{'reference':<12} not built: no KL term is switched on"))
    return rows


def _devices_text(devices: tuple[int, ...] | None, num_gpus_per_node: int) -> str:
    if devices is None:
        return "this machine"
    num_nodes = max(devices) // num_gpus_per_node + 1 if num_gpus_per_node else 1
    return f"devices {_ranges(devices)}" + (f" of {num_nodes} machines" if num_nodes > 1 else "")


def _ranges(devices: tuple[int, ...]) -> str:
    if devices == tuple(range(devices[0], devices[-1] + 1)):
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))


def _rollout_text(config: ExperimentConfig) -> str:
    return (
        f"{config.rollout_batch_size} prompts × {config.num_return_sequences_in_group} samples = "
        f"{config.samples_per_rollout}; prompt ≤ {config.prompt_length}, response ≤ {config.max_response_length} tokens"
    )


def _updates_text(config: ExperimentConfig) -> str:
    args = config.actor_train.training_args
    return (
        f"{config.samples_per_rollout} samples × {config.ppo_epochs} epoch(s) → mini-batches of "
        f"{config.mini_batch_size} ({args.gradient_accumulation_steps} micro-batch(es) of "
        f"{args.per_device_train_batch_size} × DP {config.data_parallel_size}) → {config.updates_per_rollout} "
        f"optimizer steps a rollout, {config.updates_per_rollout * config.max_steps} in all"
    )


def _ratio_text(config: ExperimentConfig) -> str:
    low, high = config.clip_range
    dual = config.effective_dual_clip_ratio
    return (
        f"{config.importance_sampling}, clip {low:g}/{high:g} (to [{1 - low:g}, {1 + high:g}]), "
        f"{f'dual clip {dual:g}' if dual else 'no dual clip'}, {config.loss_agg_mode}, {config.adv_estimator}"
    )


def _rewards_text(config: ExperimentConfig) -> str:
    return "; ".join(
        f"{name}: {r.worker_cls} × {r.world_size}, {r.timeout_s:g} s a sample" for name, r in config.rewards.items()
    )


def _log_probs_text(config: ExperimentConfig) -> str:
    trainer = config.actor_train.strategy_args.strategy_name
    engine = config.actor_infer.strategy_args.strategy_name
    old = f"recomputed by {trainer}" if config.enable_old_logprobs_recompute else f"those of {engine}"
    reference = "none"
    if config.needs_reference and config.reference is not None:
        reference = config.reference.strategy_args.strategy_name
    return f"old: {old}; reference: {reference}; at temperature {config.actor_infer.generating_args.temperature:g}"


def _memory_text(config: ExperimentConfig, size: ModelSize | None) -> str:
    if size is None:
        return "unknown: the model is not here yet"
    total = 0.0
    train = config.actor_train
    itemsize = BYTES_PER_PARAMETER[train.model_args.dtype]
    held, sharded_by = _parameters_per_rank(size, train.strategy_args), 1
    if isinstance(train.strategy_args, MegatronTrainArgs):
        sharded_by = config.data_parallel_size if train.strategy_args.strategy_config.use_distributed_optimizer else 1
    main_copy = 0 if itemsize == 4 else 4  # low-precision parameters have a float32 copy in the optimizer
    total += held * (itemsize + 4 + (8 + main_copy) / sharded_by)
    if config.needs_reference and config.reference is not None:
        reference = config.reference
        dtype = BYTES_PER_PARAMETER[reference.model_args.dtype]
        total += _parameters_per_rank(size, reference.strategy_args) * dtype
    infer, args = config.actor_infer, config.actor_infer.strategy_args
    tensor = args.strategy_config.tensor_parallel_size if isinstance(args, VllmArgs) else 1
    total += size.num_parameters / tensor * BYTES_PER_PARAMETER[infer.model_args.dtype]
    figure = f"about {total / GIB:.3g} GiB a device"
    return f"{figure} for weights, gradients and optimizer; activations and KV cache come on top"


def _parameters_per_rank(size: ModelSize, args: object) -> float:
    if not isinstance(args, MegatronTrainArgs | MegatronInferArgs):
        return size.num_parameters
    c = args.strategy_config
    tensor, pipeline = c.tensor_model_parallel_size, c.pipeline_model_parallel_size
    dense = (size.num_parameters - size.num_expert_parameters) / (tensor * pipeline)
    expert_tensor = c.expert_tensor_parallel_size or tensor
    return dense + size.num_expert_parameters / (c.expert_model_parallel_size * expert_tensor * pipeline)


def _run_text(config: ExperimentConfig) -> str:
    validation = f"validation every {config.eval_steps}" if config.validation else "no validation"
    resume = f", resume: {config.resume_from_checkpoint}" if config.resume_from_checkpoint else ""
    return f"{config.max_steps} steps, checkpoint every {config.save_steps}, {validation}, seed {config.seed}{resume}"


def _warnings(config: ExperimentConfig) -> list[str]:
    found = []
    if config.updates_per_rollout == 1:
        found.append(
            "one optimizer step a rollout: old and current policy are the same, the ratio is 1 and neither clip nor "
            "importance_sampling does anything; lower actor_train.training_args.gradient_accumulation_steps"
        )
    sequence_level = config.importance_sampling != "token"
    if sequence_level and config.loss_agg_mode != "seq-mean-token-mean":
        found.append(
            f"loss_agg_mode: {config.loss_agg_mode} weighs sequences by length, the GSPO paper does not; "
            "loss_agg_mode=seq-mean-token-mean is the paper's"
        )
    widest = max(config.clip_range)
    if sequence_level and widest > TOKEN_SCALE_CLIP:
        found.append(
            f"importance_sampling: {config.importance_sampling} with the clip range {config.clip_range}: sequence "
            "ratios hardly leave [0.99, 1.01], so it never clips; the paper's is 3e-4/4e-4 "
            "(use_pg_clip_range: true, pg_clip_low: 3e-4, pg_clip_high: 4e-4)"
        )
    if not sequence_level and widest < TOKEN_SCALE_CLIP:
        found.append(
            f"importance_sampling: token with the clip range {config.clip_range}: token ratios leave it at once and "
            "nearly every token is clipped; 0.2/0.27 is usual"
        )
    sampling = config.actor_infer.generating_args
    if not config.enable_old_logprobs_recompute and (sampling.top_p < 1 or sampling.top_k > 0):
        found.append(
            "top_p/top_k with enable_old_logprobs_recompute: false: the engine's log-probs are of the truncated "
            "distribution, the trainer's are not, which biases the ratio; set top_p: 1, top_k: 0"
        )
    return found


def _not_runnable(config: ExperimentConfig) -> list[str]:
    """Features of later versions that this configuration describes."""
    found = []
    if config.execution == "ray":
        found.append("execution: ray is not supported yet; set execution: local")
    for name, role in (
        ("actor_train", config.actor_train),
        ("actor_infer", config.actor_infer),
        ("reference", config.reference),
    ):
        if role is None:
            continue
        if role.device_mapping and len(role.device_mapping) > 1:
            found.append(
                f"{name}.device_mapping: {len(role.device_mapping)} devices are not supported yet; set it to null"
            )
        elif role.device_mapping and role.device_mapping != (0,):
            found.append(
                f"{name}.device_mapping: a choice of device is not supported yet; set it to null and choose with "
                "CUDA_VISIBLE_DEVICES"
            )
        settings = role.strategy_args.strategy_config.model_dump()
        for key, value in settings.items():
            if key.endswith("parallel_size") and value not in (None, 1):
                found.append(f"{name}.strategy_args.strategy_config.{key}: {value} is not supported yet; set it to 1")
        if settings.get("sequence_parallel"):
            found.append(
                f"{name}.strategy_args.strategy_config.sequence_parallel is not supported yet; set it to false"
            )
    return found
