"""The Python API: load a configuration, show its plan, train, evaluate.

    import roll_gspo

    config = roll_gspo.load_config("example_gspo", overrides=["max_steps=10", "strategy=hf"])
    print(roll_gspo.plan(config).text())
    result = roll_gspo.train(config)

Errors that the command prints are raised here as subclasses of `roll_gspo.errors.RollGspoError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from roll_gspo import evaluation, run
from roll_gspo.checkpoint import Best, Checkpoint, complete_checkpoints, read_best
from roll_gspo.config.load import Loaded
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.plan import Plan, make_plan
from roll_gspo.tracking.jsonl import read_metrics

if TYPE_CHECKING:
    from roll_gspo.pipelines.rlvr.validation import Summary
    from roll_gspo.pipelines.step_loop import Callback


@dataclass(frozen=True)
class RunResult:
    """A training that ended in order.

    Attributes:
        folder: folder of the run, with `metrics.jsonl`, `rollouts/`, `report.html` and `config.yaml`.
        checkpoints: complete checkpoints, lowest step first.
        best: the best checkpoint by `checkpoint_config.keep_best`, or None.
        stopped: True if Ctrl-C, SIGTERM or a callback ended the run before its last step.
    """

    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    best: Best | None
    stopped: bool

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Metrics per step: the lines of `metrics.jsonl`. Step 0 is the validation before training."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def best_checkpoint(self) -> Path | None:
        """Folder of the best checkpoint if `checkpoint_config.keep_best` is set, else of the last; None without any."""
        step = None if self.best is None else self.best.step
        folders = [c.folder for c in self.checkpoints if step is None or c.step == step]
        return folders[-1] if folders else None


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of an evaluation.

    Attributes:
        folder: folder with `evaluation.json`, `evaluation.md` and the samples.
        summaries: metrics by group of prompts, and of all prompts under `all`.
        table: the metrics as a Markdown table.
    """

    folder: Path
    summaries: dict[str, Summary]
    table: str

    @property
    def score_mean(self) -> float:
        """Mean score over all scored samples."""
        return self.summaries["all"].score_mean


def load_config(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> AnyConfig:
    """Compose and validate a configuration, like `--config-name name key=value ... [--config-dir FOLDER]`.

    Keys of ROLL without an effect are reported by `warnings.warn`.

    Args:
        name: name of a shipped configuration, or of a YAML file in `config_dir`.
        overrides: `key=value` or `group=option`, as on the command line.
        config_dir: folder of your own configurations and groups.

    Raises:
        ConfigError: the configuration does not exist or is not valid. The message has one line per problem.
    """
    loaded = load(name, overrides, config_dir)
    for text in loaded.warnings:
        warnings.warn(text, stacklevel=2)
    return loaded.config


def load(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Loaded:
    """Return the configuration of `load_config` together with its warnings.

    Raises:
        ConfigError: see `load_config`.
    """
    Plugins.instance().register(run.ShippedConfigs)
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    outer = HydraConfig.instance().cfg  # set if the caller is a Hydra application
    try:
        arguments = run.hydra_arguments([*flags, *overrides], scratch="unused")[len(flags) :]
        if config_dir is None:
            context = initialize(config_path=None, version_base="1.3", job_name="roll_gspo")
        else:
            context = initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3", job_name="roll_gspo")
        with context:
            composed = compose(config_name=name, overrides=arguments, return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            with open_dict(composed):
                del composed["hydra"]
            return run.load_composed(composed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(run.composition_problem(error, run.configuration_names(flags))) from error
    finally:
        HydraConfig.instance().cfg = outer


def plan(config: AnyConfig) -> Plan:
    """Return the plan of a run: devices, batches, memory, warnings, and settings that cannot run on this machine."""
    return make_plan(config)


def train(config: AnyConfig, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train in this process and wait for the end. Ctrl-C finishes the step, saves, and returns.

    The function sets the environment variables of `config.system_envs` and those that the engines read.

    Args:
        config: from `load_config`.
        callbacks: functions `(step, metrics) -> bool | None`, called after every step. If one returns True, the run
            saves and ends after this step.

    Raises:
        ConfigError, DataError, MissingDependencyError: the run cannot start.
        RollGspoError: the run failed. `resume_from_checkpoint=true` resumes from its last checkpoint.
    """
    finished = run.train(config, make_plan(config), callbacks)
    folder = finished.folder
    checkpoints = tuple(complete_checkpoints(folder.checkpoints))
    return RunResult(folder.path, checkpoints, read_best(folder.checkpoints), finished.stopped)


def evaluate(
    config: AnyConfig, checkpoint: str | Path | None = None, out: str | Path | None = None
) -> EvaluationResult:
    """Sample and score the validation prompts of a configuration, without training.

    Args:
        config: from `load_config`; its blocks `validation`, `rewards` and `actor_infer` are used.
        checkpoint: a run folder, a checkpoint, or a model in Hugging Face layout; None selects `config.pretrain`.
        out: folder of the result; None makes a new one in `output_dir/exp_name`.

    Raises:
        ConfigError, DataError, MissingDependencyError: the evaluation cannot start.
        RewardError: no sample could be scored.
    """
    from roll_gspo.pipelines.evaluate import table

    paths = [None if path is None else str(path) for path in (checkpoint, out)]
    evaluation_config, evaluated = evaluation.find(config, *paths)
    summaries = evaluation.evaluate(evaluation_config, evaluated)
    return EvaluationResult(evaluated.out, {s.group: s for s in summaries}, table(summaries))
