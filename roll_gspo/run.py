"""Entry point: compose the YAML, validate it, print the plan, then build and run the pipeline.

    python -m roll_gspo.run --config-name example_gspo [key=value ...] [--dry-run] [--multirun] [--cfg job]

torch, vllm and megatron are imported only after the configuration is validated.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hydra
import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roll_gspo.command_line import check_arguments, flags_and_overrides, forbid_callbacks, override_problem
from roll_gspo.config import sources
from roll_gspo.config.legacy import LATER_VALUES
from roll_gspo.config.load import Loaded, load
from roll_gspo.config.sft import AnyConfig
from roll_gspo.declarations import EXTENSIBLE
from roll_gspo.errors import ConfigError, DataError, MissingDependencyError, RollGspoError
from roll_gspo.printable import printable
from roll_gspo.registry import did_you_mean, is_dotted_path
from roll_gspo.sweep import Sweep, job_command, parse_jobs, swept_keys

if TYPE_CHECKING:
    from roll_gspo.pipelines.lifecycle import Finished
    from roll_gspo.pipelines.plan import Plan
    from roll_gspo.pipelines.step_loop import Callback

PACKAGE = Path(__file__).resolve().parent
# Disable the output folders and log files of Hydra, because a run already has a folder.
HYDRA_DEFAULTS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    "hydra.hydra_logging.root": "null",  # configures nothing, also if a file has handlers, which can run code
}
# Errors that the user must fix before a run can start, and the place of each.
TO_MEND = {ConfigError: "configuration", DataError: "data", MissingDependencyError: "installation"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
USAGE = """usage: roll-gspo --config-name NAME [key=value ...] [--dry-run] [--multirun [--jobs N]] [--cfg job]

  --config-name NAME   one of: {names}
                       or a YAML of yours, with --config-dir FOLDER
  key=value            override any key, e.g. max_steps=10 importance_sampling=token strategy=hf
  --dry-run            print the plan, check what can be checked, and stop
  --multirun           one run for each combination of comma-separated values, e.g. seed=0,1,2
  --jobs N             how many runs of a --multirun at a time (default 1)
  --cfg job            print the composed configuration and stop
"""


def shipped(installed: str, checkout: str) -> Path:
    """Return a folder of shipped YAML: in the wheel, else in the checkout (site-packages may hold another conf/)."""
    candidates = (PACKAGE / installed, PACKAGE.parent / checkout)
    return next(folder for folder in candidates if folder.is_dir())


def shipped_folders() -> list[Path]:
    """Hydra search path of the shipped configurations and config groups."""
    return [shipped("examples", "examples/docs_examples"), shipped("conf", "conf")]


class ShippedConfigs(SearchPathPlugin):
    """Append the shipped folders and user functions to Hydra's search path, after the user's folders.

    Hydra appends the folder of --config-dir after those of plugins, so it is added here as well.
    """

    user_folders: ClassVar[tuple[Path, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.user_folders:
            search_path.append(provider="user", path=f"file://{folder.resolve()}")
        for folder in shipped_folders():
            search_path.append(provider="roll_gspo", path=f"file://{folder}")
        SourcesRegistry.instance().register(FunctionOptions)
        search_path.append(provider="roll_gspo", path=f"{FunctionOptions.scheme()}://")


class FunctionOptions(ConfigSource):
    """Accept the dotted path of a function as an option of its group, e.g. `policy_loss=my_losses.gated`."""

    @staticmethod
    def scheme() -> str:
        return "function"

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, path = config_path.removesuffix(".yaml").partition("/")
        config = OmegaConf.create({group: path})
        return ConfigResult(self.provider, f"{self.scheme()}://{config_path}", config, {"package": "_global_"})

    def is_config(self, config_path: str) -> bool:
        group, _, path = config_path.removesuffix(".yaml").partition("/")
        return group in EXTENSIBLE and is_dotted_path(path)

    def is_group(self, config_path: str) -> bool:
        return config_path in EXTENSIBLE

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        return []


def main() -> None:
    """Console entry point.

    The exit status is 0 on success and 1 if the run failed. It is 2 if configuration, data or installed packages must
    be fixed first, and 128 + signal if the run was stopped, e.g. 130 after Ctrl-C.
    """
    arguments = sys.argv[1:]
    names = configuration_names([])
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(names=", ".join(names)))
        raise SystemExit(0 if arguments else 2)
    os.environ["ROLL_GSPO_DRY_RUN"] = "1" if "--dry-run" in arguments else ""
    try:
        check_arguments(arguments)
        num_jobs, arguments = parse_jobs([a for a in arguments if a != "--dry-run"])
    except ConfigError as error:
        report_problems(str(error).splitlines(), "command line")
        raise SystemExit(2) from None
    sweep = Sweep(num_jobs)
    with_composed(arguments, lambda composed: _job(composed, arguments, sweep), sweep.finish)


def with_composed(
    arguments: list[str], use: Callable[[DictConfig], None], finish: Callable[[], None] = lambda: None
) -> None:
    """Compose the configuration of the command line, call `use` (once per job of a --multirun), then `finish`.

    Raises:
        SystemExit: composition failed and the reason was printed (status 2), or `use` or `finish` raised it.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # makes user modules importable with the console script
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise: `composition_problem` words the errors
    Plugins.instance().register(ShippedConfigs)
    ShippedConfigs.user_folders = tuple(_user_folders(arguments))
    forbid_callbacks()
    started: list[bool] = []

    def job(composed: DictConfig) -> None:
        started.append(True)
        use(composed)

    job.__module__ = "__main__"  # else Hydra uses package folders, e.g. execution/, as config groups
    with tempfile.TemporaryDirectory() as scratch:
        try:
            sys.argv[1:] = hydra_arguments(arguments, scratch)
            hydra.main(version_base="1.3", config_path=None)(job)()
            finish()
        except (
            HydraException,
            OmegaConfBaseException,
            yaml.YAMLError,
            RecursionError,
            RollGspoError,
            ValueError,
        ) as error:
            if started:
                raise
            report_problems([composition_problem(error, configuration_names(arguments))])
            raise SystemExit(2) from None


def configuration_names(arguments: list[str]) -> list[str]:
    """Return the names that --config-name accepts: shipped, then the user's with the --config-dir in `arguments`."""
    folders = [shipped_folders()[0], *_user_folders(arguments)]
    names = [name for folder in folders for name in sorted(file.stem for file in folder.glob("*.yaml"))]
    return list(dict.fromkeys(names))


def composition_problem(error: Exception, names: list[str]) -> str:
    """Describe a composition error of Hydra; `names` are the shipped configurations."""
    if isinstance(error, RollGspoError):
        return str(error)
    if isinstance(error, RecursionError):
        return (
            "defaults: a file leads back to itself; a file in --config-dir cannot derive from the shipped one of the "
            "same name, which it replaces; rename your file"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = str(error.missing_cfg_file).removesuffix(".yaml")
        group, _, name = missing.rpartition("/")
        if group and "primary config" in str(error):
            return f"--config-name: '{missing}' is a path; write --config-dir {group} --config-name {name}"
        known = list(error.options) if group and error.options else [] if group else names
        listed = f"{did_you_mean(name, known)} (known: {', '.join(known)})" if known else ""
        if name in LATER_VALUES.get(group, {}):
            return f"{group}: not supported yet: {LATER_VALUES[group][name]} ('{name}')"
        if group:
            extensible = "; or give the dotted path of your function" if group in EXTENSIBLE else ""
            return f"{group}: no option '{name}'{listed}{extensible}"
        return f"--config-name: no configuration '{name}'{listed}; name the folder of one of yours with --config-dir"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML: {error.problem}"
    return override_problem(error)


def hydra_arguments(arguments: list[str], scratch: str) -> list[str]:
    """Convert command-line arguments to Hydra's syntax.

    Hydra rejects `key=value` for a key that no YAML file mentions, even if the schema knows it. Plain keys therefore
    become `++key=value`, and config groups are unchanged. Files that Hydra writes in a --multirun go to `scratch`.
    """
    groups = _config_groups(arguments)
    flags, overrides = flags_and_overrides(arguments)
    passed = [f"++{o}" if _is_plain_override(o, groups) else _null_as_option(o, groups) for o in overrides]
    given = {o.lstrip("+").partition("=")[0] for o in passed}
    defaults = {**HYDRA_DEFAULTS, "hydra.sweep.dir": scratch}
    return [*flags, *passed, *(f"{key}={value}" for key, value in defaults.items() if key not in given)]


def _is_plain_override(argument: str, groups: set[str]) -> bool:
    key, equals, _ = argument.partition("=")
    if not equals or argument.startswith(("-", "+", "~")) or key.startswith("hydra"):
        return False
    return "/" not in key and key.partition("@")[0] not in groups


def _null_as_option(argument: str, groups: set[str]) -> str:
    """Convert `reward_norm=null`, which Hydra rejects for a group, to the option `none`, which sets null."""
    group, _, value = argument.partition("=")
    if value != "null" or group not in groups:
        return argument
    if not any((folder / group / "none.yaml").is_file() for folder in shipped_folders()):
        raise ConfigError(f"{group}: null is no option of this group; leave it out, or name one of its options")
    return f"{group}=none"


def _config_groups(arguments: list[str]) -> set[str]:
    folders = [*shipped_folders(), *_user_folders(arguments)]
    return {sub.name for folder in folders if folder.is_dir() for sub in folder.iterdir() if sub.is_dir()}


def _user_folders(arguments: list[str]) -> list[Path]:
    folders = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, inline = flag.partition("=")
        if name in ("--config-dir", "-cd", "--config-path", "-cp"):
            folders.append(Path(inline if equals else value))
    return folders


def _job(composed: DictConfig, arguments: list[str], sweep: Sweep) -> None:
    info = HydraConfig.get()
    if info.mode == RunMode.MULTIRUN:
        flags, overrides = flags_and_overrides(arguments)
        sweep.start(*job_command(flags, list(info.overrides.task), swept_keys(overrides), info.job.num))
        return
    code = exit_status(
        lambda: run(load_composed(composed)), "resume_from_checkpoint=true goes on from the last checkpoint"
    )
    if code:
        raise SystemExit(code)


def exit_status(command: Callable[[], int], after_full_disk: str) -> int:
    """Run `command` and return its exit status; print an error and return its status (see `main`).

    Args:
        command: loads the composed configuration and runs.
        after_full_disk: advice for the time after disk space is freed.
    """
    try:
        code = command()
    except tuple(TO_MEND) as error:
        place = next(place for kind, place in TO_MEND.items() if isinstance(error, kind))
        report_problems(str(error).splitlines(), place)
        code = 2
    except RollGspoError as error:
        code = _report_failure(str(error))
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it at exit
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _report_failure(f"{error}; make room, and {after_full_disk}")
    except KeyboardInterrupt:
        print("roll_gspo: stopped at once; nothing more was saved", file=sys.stderr)
        code = 128 + signal.SIGINT
    return code


def _report_failure(text: str) -> int:
    print(printable(f"roll_gspo: {text}"), file=sys.stderr)
    _traceback_if_asked()
    return 1


def report_problems(lines: list[str], place: str = "configuration") -> None:
    """Print one line per problem, and the place of the problems."""
    print(f"roll_gspo: {len(lines)} problem{'s' * (len(lines) > 1)} in the {place}", file=sys.stderr)
    print("\n".join(f"  {printable(line)}" for line in lines), file=sys.stderr)
    _traceback_if_asked()


def load_composed(composed: DictConfig) -> Loaded:
    """Validate the composed configuration of this job."""
    info = HydraConfig.get()
    if info.job.config_name is None:
        raise ConfigError("--config-name: missing; say which configuration to run (roll-gspo --help lists them)")
    folders = [
        Path(source.path.removeprefix("file://")) for source in info.runtime.config_sources if source.schema == "file"
    ]
    name = info.job.config_name.removesuffix(".yaml")
    choices = {k: v for k, v in info.runtime.choices.items() if isinstance(v, str) and not k.startswith("hydra/")}
    where = sources.collect(name, folders, choices, info.overrides.task)
    return load(composed, where, choices)


def run(loaded: Loaded) -> int:
    """Print the plan, run the pipeline, and return the exit status."""
    from roll_gspo.pipelines.disk import disk_warnings
    from roll_gspo.pipelines.plan import make_plan
    from roll_gspo.pipelines.preflight import check_rewards, check_start

    config = loaded.config
    plan = make_plan(config, (*loaded.warnings, *disk_warnings(config)))
    print(printable(replace(plan, not_runnable=()).text()), flush=True)  # printed as errors instead
    if not os.environ.get("ROLL_GSPO_DRY_RUN"):
        return train(config, plan).status
    folder = check_start(config, plan)
    check_rewards(config)
    for note in folder.notes:
        print(printable(f"  {'resume':<11} {note}"))
    return 0


def train(config: AnyConfig, plan: Plan, callbacks: Sequence[Callback] = ()) -> Finished:
    """Check what can be checked before heavy work, set the environment, and run the training.

    Raises:
        ConfigError, DataError, MissingDependencyError: a check fails.
    """
    from roll_gspo.pipelines.pipeline import pipeline_of
    from roll_gspo.pipelines.preflight import check_start

    set_environment(config.system_envs)
    check_start(config, plan)
    from roll_gspo.pipelines.lifecycle import run_training

    return run_training(pipeline_of(config), config, plan.text(), callbacks)


def set_environment(system_envs: dict[str, str]) -> None:
    """Set the environment variables that torch and engines read on import; the user's values have precedence."""
    os.environ.update(system_envs)
    defaults = {
        # Waiting OpenMP threads must sleep: on few cores, spinning threads slow down working ones.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # hides messages on NUMA binding that need no action
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _traceback_if_asked() -> None:
    if os.environ.get("ROLL_GSPO_DEBUG"):
        print(printable(traceback.format_exc()), file=sys.stderr)


if __name__ == "__main__":
    main()
