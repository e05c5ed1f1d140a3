"""Evaluate a checkpoint on the validation data of a configuration, without training.

    python -m roll_gspo.evaluate --config-name example_gspo [ckpt=PATH] [out=FOLDER] [validation=math] [key=value ...]

torch and vllm are imported only after the configuration is validated.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from roll_gspo.command_line import check_arguments
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.load import Loaded
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import ConfigError
from roll_gspo.printable import printable
from roll_gspo.run import exit_status, load_composed, report_problems, set_environment, with_composed

if TYPE_CHECKING:
    from roll_gspo.pipelines.evaluated import Evaluated
    from roll_gspo.pipelines.rlvr.validation import Summary

USAGE = """usage: python -m roll_gspo.evaluate --config-name NAME [ckpt=PATH] [out=FOLDER] [key=value ...] [--dry-run]

  --config-name NAME   as of roll-gspo; its blocks validation, rewards and actor_infer say what is done
  ckpt=PATH            a run (its newest checkpoint), RUN/checkpoints/step_000020 or best.json, or a model in Hugging
                       Face layout, folder or name; default: what `pretrain` names
  out=FOLDER           of the result; default: a new one in output_dir/exp_name
  validation=OPTION    another benchmark, e.g. math_benchmarks, aime, gsm8k, math (all of them)
  key=value            override any key, e.g. strategy=hf validation.generating_args.num_return_sequences=8
  --dry-run            print the plan and stop
"""
OWN = ("ckpt", "out")


def main() -> None:
    """Console entry point. The exit status is the same as in `roll_gspo.run.main`."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    try:
        check_arguments(arguments)
        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError("--multirun: one evaluation at a time; give one value of each key")
    except ConfigError as error:
        report_problems(str(error).splitlines(), "command line")
        raise SystemExit(2) from None
    own = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if a.partition("=")[0] in OWN and "=" in a}
    rest = [a for a in arguments if a.partition("=")[0] not in own and a != "--dry-run"]

    def use(composed: DictConfig) -> None:
        code = exit_status(
            lambda: run(load_composed(composed), own.get("ckpt"), own.get("out"), "--dry-run" in arguments),
            "evaluate again",
        )
        if code:
            raise SystemExit(code)

    with_composed(rest, use)


def run(loaded: Loaded, ckpt: str | None = None, out: str | None = None, dry_run: bool = False) -> int:
    """Print the plan, evaluate, print the table, and return the exit status."""
    from roll_gspo.pipelines.evaluated import evaluation_plan

    config, evaluated = find(loaded.config, ckpt or None, out or None)
    print(printable(evaluation_plan(config, evaluated).text()), flush=True)
    if dry_run:
        return 0
    summaries = evaluate(config, evaluated)
    from roll_gspo.pipelines.evaluate import table

    print(printable(f"\n{table(summaries)}\n\n{evaluated.out}"), flush=True)
    return 0


def find(config: AnyConfig, ckpt: str | None, out: str | None) -> tuple[ExperimentConfig, Evaluated]:
    """Return the configuration, checked to have rewards, and the model to evaluate.

    Raises:
        ConfigError: the pipeline has no rewards, the model does not exist, or `out` already holds a result.
    """
    from roll_gspo.pipelines.evaluated import find_evaluated

    if not isinstance(config, ExperimentConfig):
        raise ConfigError(
            f"pipeline: {config.pipeline} has no rewards to score responses with; name a configuration of pipeline: "
            "rlvr, and give the model as ckpt=PATH"
        )
    return config, find_evaluated(config, ckpt, out)


def evaluate(config: ExperimentConfig, evaluated: Evaluated) -> list[Summary]:
    """Check what can be checked before heavy work, set the environment, and evaluate.

    Raises:
        ConfigError, DataError, MissingDependencyError: a check fails.
        RewardError: no sample could be scored.
    """
    from roll_gspo.pipelines.evaluated import check_evaluation, evaluation_plan

    check_evaluation(config, evaluation_plan(config, evaluated))
    set_environment(config.system_envs)
    from roll_gspo.pipelines import evaluate as evaluation

    return evaluation.evaluate(config, evaluated)
