"""Entry point: compose the YAML, validate it, print the plan, then build and run the pipeline.

    python -m roll_gspo.run --config-name example_gspo [key=value ...] [--dry-run] [--multirun] [--cfg job]

Nothing heavy (torch, vllm, megatron) is imported before the configuration is known to be right.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from roll_gspo.config import sources
from roll_gspo.config.legacy import LATER_VALUES
from roll_gspo.config.load import Loaded, load
from roll_gspo.errors import ConfigError, DataError, MissingDependencyError, RollGspoError
from roll_gspo.registry import did_you_mean

PACKAGE = Path(__file__).resolve().parent
# Hydra's own output folders and log files would litter the user's: a run has its folder already.
HYDRA_DEFAULTS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
FLAGS_WITH_VALUE = (
    *("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--cfg", "-c"),
    *("--package", "-p", "--experimental-rerun"),
)
# What is to be mended before anything can start, and where.
TO_MEND = {ConfigError: "configuration", DataError: "data", MissingDependencyError: "installation"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
USAGE = """usage: roll-gspo --config-name NAME [key=value ...] [--dry-run] [--multirun] [--cfg job]

  --config-name NAME   one of: {names}
                       or a YAML of yours, with --config-dir FOLDER
  key=value            override any key, e.g. max_steps=10 importance_sampling=token strategy=hf
  --dry-run            print the plan and stop
  --multirun           one run for each combination of comma-separated values, e.g. seed=0,1,2
  --cfg job            print the composed configuration and stop
"""


def shipped(installed: str, checkout: str) -> Path:
    """A folder of shipped YAML: inside the wheel, else in the checkout (site-packages may hold a stranger's conf/)."""
    candidates = (PACKAGE / installed, PACKAGE.parent / checkout)
    return next(folder for folder in candidates if folder.is_dir())


def shipped_folders() -> list[Path]:
    """Where `--config-name` and the config groups are found."""
    return [shipped("examples", "examples/docs_examples"), shipped("conf", "conf")]


class ShippedConfigs(SearchPathPlugin):
    """Puts the shipped folders behind the user's own on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in shipped_folders():
            search_path.append(provider="roll_gspo", path=f"file://{folder}")


def main() -> None:
    """Console entry point.

    Exits 0 on success; 2 where there is something to mend before anything can start (configuration, data, a package
    that is not installed); 1 where a run failed; 128 + signal, e.g. 130 after Ctrl-C, where it was stopped.
    """
    arguments = sys.argv[1:]
    names = sorted(file.stem for file in shipped_folders()[0].glob("*.yaml"))
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(names=", ".join(names)))
        raise SystemExit(0 if arguments else 2)
    os.environ["ROLL_GSPO_DRY_RUN"] = "1" if "--dry-run" in arguments else ""
    arguments = [a for a in arguments if a != "--dry-run"]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra's exceptions through: they are worded below
    Plugins.instance().register(ShippedConfigs)
    started: list[bool] = []

    def job(composed: DictConfig) -> None:
        started.append(True)
        _job(composed, arguments)

    with tempfile.TemporaryDirectory() as scratch:
        sys.argv[1:] = hydra_arguments(arguments, scratch)
        try:
            hydra.main(version_base="1.3", config_path=None)(job)()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            if started:
                raise
            users = (file.stem for folder in _user_folders(arguments) for file in folder.glob("*.yaml"))
            _report_problems([composition_problem(error, [*names, *users])])
            raise SystemExit(2) from None


def composition_problem(error: Exception, names: list[str]) -> str:
    """What kept Hydra from composing, in this package's words; `names` are the shipped configurations."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        known = list(error.options) if group and error.options else names
        listed = f"{did_you_mean(name, known)} (known: {', '.join(known)})"
        if name in LATER_VALUES.get(group, {}):
            return f"{group}: not supported yet: {LATER_VALUES[group][name]} ('{name}')"
        if group:
            return f"{group}: no option '{name}'{listed}"
        return f"--config-name: no configuration '{name}'{listed}; name the folder of one of yours with --config-dir"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML: {error.problem}"
    text = " ".join(str(error.__cause__ or error).split())
    if match := re.match(r"Could not override '([^'@]+)", text):
        group = match[1]
        return (
            f"{group}: the defaults of this configuration name no option of the group {group}, so there is none to "
            f"replace; write +{group}=OPTION to add one, or '- {group}: OPTION' in its defaults list"
        )
    return text


def hydra_arguments(arguments: list[str], scratch: str) -> list[str]:
    """Command-line arguments as Hydra takes them.

    Hydra refuses `key=value` for a key that no YAML file mentions, although the schema knows it (or knows better
    what was meant), so plain keys become `++key=value`; config groups stay as they are. What Hydra itself writes
    in a --multirun goes to the folder `scratch`.
    """
    groups = _config_groups(arguments)
    flags, overrides = flags_and_overrides(arguments)
    passed = [f"++{o}" if _is_plain_override(o, groups) else o for o in overrides]
    given = {o.lstrip("+").partition("=")[0] for o in passed}
    defaults = {**HYDRA_DEFAULTS, "hydra.sweep.dir": scratch}
    return [*flags, *passed, *(f"{key}={value}" for key, value in defaults.items() if key not in given)]


def flags_and_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--flag [value]` apart from `key=value`: Hydra's parser refuses overrides before and after a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_value = previous in FLAGS_WITH_VALUE or (previous in ("--info", "-i") and "=" not in argument)
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
    return flags, overrides


def _is_plain_override(argument: str, groups: set[str]) -> bool:
    key, equals, _ = argument.partition("=")
    if not equals or argument.startswith(("-", "+", "~")) or key.startswith("hydra"):
        return False
    return "/" not in key and key.partition("@")[0] not in groups


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


def _job(composed: DictConfig, arguments: list[str]) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _run_in_a_process_of_its_own(arguments)
        return
    try:
        loaded = load_composed(composed)
        code = run(loaded)
    except tuple(TO_MEND) as error:
        place = next(place for kind, place in TO_MEND.items() if isinstance(error, kind))
        _report_problems(str(error).splitlines(), place)
        code = 2
    except RollGspoError as error:
        code = _report_failure(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _report_failure(f"{error}; make room, and resume_from_checkpoint=true goes on from the last checkpoint")
    except KeyboardInterrupt:
        print("roll_gspo: stopped at once; nothing more was saved", file=sys.stderr)
        code = 128 + signal.SIGINT
    if code:
        raise SystemExit(code)


def _report_failure(text: str) -> int:
    print(f"roll_gspo: {text}", file=sys.stderr)
    _traceback_if_asked()
    return 1


def _report_problems(lines: list[str], place: str = "configuration") -> None:
    print(f"roll_gspo: {len(lines)} problem{'s' * (len(lines) > 1)} in the {place}", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    _traceback_if_asked()


def load_composed(composed: DictConfig) -> Loaded:
    """Validate what Hydra composed for this job."""
    info = HydraConfig.get()
    if info.job.config_name is None:
        raise ConfigError("--config-name: missing; say which configuration to run (roll-gspo --help lists them)")
    folders = [
        Path(source.path.removeprefix("file://")) for source in info.runtime.config_sources if source.schema == "file"
    ]
    name = info.job.config_name.removesuffix(".yaml")
    primary = next((f / f"{name}.yaml" for f in folders if (f / f"{name}.yaml").is_file()), None)
    choices = {k: v for k, v in info.runtime.choices.items() if isinstance(v, str) and not k.startswith("hydra/")}
    where = sources.collect(primary, folders, choices, info.overrides.task)
    return load(composed, where, choices)


def run(loaded: Loaded) -> int:
    """Print the plan, then run the pipeline; the process's exit code."""
    from roll_gspo.pipelines import PIPELINES
    from roll_gspo.pipelines.plan import make_plan
    from roll_gspo.pipelines.preflight import preflight

    config = loaded.config
    plan = make_plan(config, loaded.warnings)
    print(plan.text(), flush=True)
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        return 0
    if plan.not_runnable:
        raise ConfigError("\n".join(plan.not_runnable))
    preflight(config)
    set_environment(config.system_envs)
    pipeline = PIPELINES.load(config.pipeline)
    return pipeline(config, plan)


def set_environment(system_envs: dict[str, str]) -> None:
    """What must stand in the environment before torch or an engine is imported; the user's own values win."""
    os.environ.update(system_envs)
    defaults = {
        # Waiting OpenMP threads must sleep: on few cores they would take the time of those that work.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # notes on NUMA binding and the like, which nobody can act on
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _run_in_a_process_of_its_own(arguments: list[str]) -> None:
    """One job of a --multirun: engines keep state in their process, so that each job needs a fresh one."""
    info = HydraConfig.get()
    flags = [flag for flag in flags_and_overrides(arguments)[0] if flag not in ("-m", "--multirun")]
    overrides = list(info.overrides.task)
    command = [sys.executable, "-m", "roll_gspo.run", *flags, *overrides]
    if not any(o.lstrip("+").startswith("run_name=") for o in overrides):
        swept = _swept_keys(arguments)
        named = [o for o in overrides if o.lstrip("+").partition("=")[0] in swept]
        command.append(f"run_name='{_run_name(named, info.job.num)}'")
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        command.append("--dry-run")
    # Ctrl-C reaches the job, too, which finishes its step and saves: this process only waits for that.
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
    if code:
        raise SystemExit(code)


def _swept_keys(arguments: list[str]) -> set[str]:
    """Keys that a --multirun varies; what Hydra hands to a job it has rewritten, so that values cannot be compared."""
    parsed = OverridesParser.create().parse_overrides(flags_and_overrides(arguments)[1])
    return {str(override.key_or_group) for override in parsed if override.is_sweep_override()}


def _run_name(overrides: list[str], number: int) -> str:
    """The same for the same values, so that a sweep is gone on with by adding resume_from_checkpoint=true."""
    words = [re.sub(r"[^\w.,-]+", "-", override.lstrip("+")) for override in overrides]
    return "_".join([f"{number:03d}", *words])[:120]


def _traceback_if_asked() -> None:
    if os.environ.get("ROLL_GSPO_DEBUG"):
        traceback.print_exc()


if __name__ == "__main__":
    main()
