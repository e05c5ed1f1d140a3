"""The plan of a run, printed before torch or an engine is imported: roles, devices, batches, warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import roll_gspo
from roll_gspo.config.base import Problem
from roll_gspo.config.sft import AnyConfig
from roll_gspo.models.size import ModelSize, size_of
from roll_gspo.models.tiny import BUILTIN, TINY_MODELS
from roll_gspo.pipelines.adapter import adapter_texts, adapter_warnings
from roll_gspo.pipelines.devices import device_problems, finds_cuda, layout_text
from roll_gspo.pipelines.gpu_memory import gpu_memory
from roll_gspo.pipelines.memory_rows import has_gpu_plan, main_memory_warnings, memory_problems, memory_texts
from roll_gspo.pipelines.passes import pass_rows
from roll_gspo.pipelines.pipeline import pipeline_of
from roll_gspo.pipelines.pretrain import builtin_folder
from roll_gspo.pipelines.sharing import sharing_problems, sharing_texts, sharing_warnings
from roll_gspo.pipelines.warnings import execution_warnings


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        title: the first line.
        rows: (label, text) pairs.
        warnings: settings that run but are probably not intended, each with its fix.
        not_runnable: settings that are valid but cannot run on these devices or with this model.
        config_warnings: what was found while the configuration was read, e.g. keys that are ignored.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[Problem, ...] = ()
    not_runnable: tuple[Problem, ...] = ()
    config_warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the plan as it is printed and written to `plan.txt`."""
        lines = [self.title]
        previous = ""
        for label, text in self.rows:
            lines.append(f"  {label if label != previous else '':<11} {text}")
            previous = label
        lines += [f"  {'warning':<11} {w}" for w in (*self.warnings, *self.config_warnings)]
        lines += [f"  {'cannot run':<11} {w}" for w in self.not_runnable]
        return "\n".join(lines)


def make_plan(config: AnyConfig, config_warnings: tuple[str, ...] = (), *, on_this_machine: bool = True) -> Plan:
    """Make the plan of a valid configuration.

    Args:
        config: the configuration.
        config_warnings: what was found while it was read.
        on_this_machine: the roles run here; if False, nothing is assumed about their devices.
    """
    pipeline = pipeline_of(config)
    size, on_cuda = size_of(config.pretrain), finds_cuda(config) if on_this_machine else None
    gpu = gpu_memory(config, on_cuda)
    rows = [
        ("model", _model_text(config, size)),
        *(("roles", _role_text(config, name)) for name in config.roles()),
        *(("roles", text) for text in sharing_texts(config, on_cuda)),
        *(("adapter", text) for text in adapter_texts(config)),
        *pipeline.plan_rows(config),
        *pass_rows(config, on_cuda),
        *(("memory", text) for text in memory_texts(config, gpu, on_cuda)),
        ("run", f"{pipeline.length_text(config)}, {_intervals_text(config)}"),
    ]
    title = f"roll_gspo {roll_gspo.__version__}: plan of {config.exp_name}"
    too_large = memory_problems(config, gpu) if has_gpu_plan(config, on_cuda) else []
    warnings = (*pipeline.warnings(config), *execution_warnings(config), *main_memory_warnings(config, on_cuda))
    warnings += (*adapter_warnings(config), *sharing_warnings(config, on_cuda))
    problems = (*_replay_problems(config, size), *pipeline.problems(config), *device_problems(config, on_cuda))
    problems += tuple(sharing_problems(config, on_cuda))
    if gpu.is_known:
        problems += tuple(too_large)
    else:
        warnings += tuple(too_large)
    problems = tuple(dict.fromkeys(problems))  # roles may share a model
    return Plan(title, tuple(rows), warnings, problems, config_warnings)


def _model_text(config: AnyConfig, size: ModelSize | None) -> str:
    count = "size unknown until it is read"
    if size is not None:
        count = f"{_count(size.num_parameters)} parameters ({size.source})"
    warm = config.warm_start
    start = f"; warm start of {warm.steps} steps on {warm.demonstrations}" if warm else ""
    name = config.pretrain.removeprefix(BUILTIN)
    if warm and name in TINY_MODELS and builtin_folder(config, name).is_dir():
        start += ", made by an earlier run"
    return f"{config.pretrain}, {count}, {config.actor_train.model_args.dtype}{start}"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _role_text(config: AnyConfig, name: str) -> str:
    role = config.roles()[name]
    return f"{name:<12} {role.strategy_args.strategy_name:<15} {layout_text(config, role)}"


def _intervals_text(config: AnyConfig) -> str:
    validation = f"validation before, every {config.eval_steps} and after" if config.validation else "no validation"
    resume = f", resume: {config.resume_from_checkpoint}" if config.resume_from_checkpoint else ""
    saved = f"checkpoint every {config.save_steps}"
    if config.checkpoint_config.keep_best is not None:
        saved += f" and at the best {config.checkpoint_config.keep_best}"
    return f"{saved}, {validation}, seed {config.seed}{resume}"


def _replay_problems(config: AnyConfig, size: ModelSize | None) -> Iterator[Problem]:
    """Yield a problem if routing replay is set for a model without routers."""
    replay = config.actor_train.router_replay
    is_dense = size is not None and size.source != "from its name" and not size.num_expert_parameters
    if (replay.mode != "disable" or replay.record) and is_dense:
        yield Problem(
            "actor_train.router_replay",
            f"{config.pretrain} has no experts to replay; choose a mixture of experts (model=tiny_qwen3_moe), or "
            "router_replay=none",
        )
