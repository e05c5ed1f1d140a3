"""The model and the plan of an evaluation, checked before torch or an engine is imported."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import roll_gspo
from roll_gspo.checkpoint import HF_EXPORT, open_checkpoint
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.validation import ValidationConfig
from roll_gspo.errors import CheckpointError, ConfigError, MissingDependencyError
from roll_gspo.models.folder_check import check_folder
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.preflight import check_files, missing_engine
from roll_gspo.pipelines.pretrain import check_model_name
from roll_gspo.pipelines.rlvr.plan import context_problems
from roll_gspo.pipelines.run_folder import unused

REPORT = "evaluation.json"


@dataclass(frozen=True)
class Evaluated:
    """The model to evaluate and the folder of the result.

    Attributes:
        model: name or folder in Hugging Face layout.
        key: configuration key or option that names the model.
        step: step of the checkpoint; 0 for a model without one.
        out: folder of the result.
    """

    model: str
    key: str
    step: int
    out: Path


def find_evaluated(config: ExperimentConfig, ckpt: str | None, out: str | None) -> Evaluated:
    """Find the model of `ckpt`: a run (its newest checkpoint), a checkpoint, or a Hugging Face folder or name.

    Args:
        config: gives the model if `ckpt` is None: the one that training starts from.
        ckpt: the value on the command line, or None.
        out: the value on the command line; None selects a new folder beside the runs.

    Raises:
        ConfigError: the model does not exist or cannot be loaded for inference, or `out` already holds a result.
    """
    if ckpt is None:
        model, key, step = model_of(config, config.actor_train), "pretrain", 0
    else:
        model, step = _of_checkpoint(Path(ckpt)) or (ckpt, 0)
        key = "ckpt"
    check_model_name(model, key)
    if Path(model).is_dir():
        check_folder(Path(model), needs_safetensors=False)
    folder = Path(out) if out else None
    if folder is not None and (folder / REPORT).exists():
        raise ConfigError(f"out: {folder} holds an evaluation already; remove it or choose another folder")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Evaluated(
        model, key, step, folder or unused(Path(config.output_dir) / config.exp_name / f"evaluation-{stamp}")
    )


def _of_checkpoint(path: Path) -> tuple[str, int] | None:
    """Return the exported policy of a run or checkpoint and its step; None if the path is not a checkpoint."""
    if not path.exists() or (path / "config.json").is_file():
        return None
    try:
        checkpoint = open_checkpoint(path, "ckpt")
    except CheckpointError as error:
        raise ConfigError(f"{error}, or a folder in Hugging Face layout") from error
    exported = checkpoint.folder / HF_EXPORT
    if not (exported / "config.json").is_file():
        raise ConfigError(
            f"ckpt: {checkpoint.folder} has no {HF_EXPORT} (save_hf_model: false); make one with python -m "
            f"roll_gspo.export {checkpoint.folder} OUT, and give ckpt=OUT"
        )
    return str(exported), checkpoint.step


def evaluation_plan(config: ExperimentConfig, evaluated: Evaluated) -> Plan:
    """Make the plan of the evaluation.

    Raises:
        ConfigError: the configuration has no validation data.
    """
    block = config.validation
    if block is None:
        raise ConfigError("validation: there is no such block, so nothing to evaluate on; add validation=OPTION")
    args, sampling = config.actor_infer.strategy_args, block.generating_args
    size, dtype = args.devices_per_worker, config.actor_infer.model_args.dtype
    engine = f"{args.strategy_name} on {size} device(s), {dtype}; no trainer"
    sources = f", only {', '.join(block.sources)}" if block.sources else ""
    rows = (
        ("model", evaluated.model + (f" (step {evaluated.step})" if evaluated.step else "")),
        ("engine", engine),
        ("data", ", ".join(block.data_args.file_name) + sources),
        (
            "sampling",
            f"{block.num_samples} sample(s) a prompt, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}; "
            f"prompt ≤ {config.validation_prompt_length}, response ≤ {config.validation_response_length} tokens",
        ),
        ("metrics", _metrics_text(block)),
        ("output", str(evaluated.out)),
    )
    title = f"roll_gspo {roll_gspo.__version__}: evaluation"
    return Plan(title, rows, not_runnable=tuple(context_problems(config, evaluated.model)))


def _metrics_text(block: ValidationConfig) -> str:
    attempts = (f"{kind}@{k}" for kind in ("pass", "maj") for k in block.attempts)
    return f"{', '.join([f'avg@{block.num_samples}', *attempts])}; by {block.group_by}"


def check_evaluation(config: ExperimentConfig, plan: Plan) -> None:
    """Check that engine and data files exist and that the plan can run.

    Raises:
        ConfigError, MissingDependencyError, DataError: a check fails.
    """
    if plan.not_runnable:
        raise ConfigError("\n".join(map(str, plan.not_runnable)))
    if missing := missing_engine("actor_infer", config.actor_infer.strategy_args):
        raise MissingDependencyError(missing)
    if config.validation is not None:
        check_files(config, {"validation.data_args.file_name": config.validation.data_args})
