"""Entry point: compose the YAML, validate it, print the plan, then build and run the pipeline.

    python -m roll_gspo.run --config-name example_gspo [key=value ...] [--dry-run] [--multirun] [--cfg job]

Nothing heavy (torch, vllm, megatron) is imported before the configuration is known to be right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig

from roll_gspo.config import sources
from roll_gspo.config.experiment import RunConfig
from roll_gspo.config.load import Loaded, load
from roll_gspo.errors import ConfigError, RollGspoError

PACKAGE = Path(__file__).resolve().parent
# Hydra's own output folders and log files would litter the user's: a run has its folder already.
HYDRA_DEFAULTS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "{}/{}/multirun".format(
        *(f"${{oc.select:{key},{RunConfig.model_fields[key].default}}}" for key in ("output_dir", "exp_name"))
    ),
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
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
            search_path.append(provider="roll_gspo", path=folder.as_uri())


def main() -> None:
    """Console entry point; exits 0 on success, 2 on a configuration error, 1 on a failed run."""
    arguments = sys.argv[1:]
    names = sorted(file.stem for file in shipped_folders()[0].glob("*.yaml"))
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(names=", ".join(names)))
        raise SystemExit(0 if arguments else 2)
    os.environ["ROLL_GSPO_DRY_RUN"] = "1" if "--dry-run" in arguments else ""
    arguments = [a for a in arguments if a != "--dry-run"]
    sys.argv[1:] = hydra_arguments(arguments)
    Plugins.instance().register(ShippedConfigs)
    started: list[bool] = []

    def job(composed: DictConfig) -> None:
        started.append(True)
        _job(composed, arguments)

    try:
        hydra.main(version_base="1.3", config_path=None)(job)()
    except SystemExit as stop:  # Hydra exits 1 where it cannot compose: that is a configuration error
        raise SystemExit(2 if stop.code == 1 and not started else stop.code) from None


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments as Hydra takes them.

    Hydra refuses `key=value` for a key that no YAML file mentions, although the schema knows it (or knows better
    what was meant), so plain keys become `++key=value`; config groups stay as they are.
    """
    groups = _config_groups(arguments)
    passed = [f"++{a}" if _is_plain_override(a, groups) else a for a in arguments]
    given = {a.lstrip("+").partition("=")[0] for a in passed}
    return passed + [f"{key}={value}" for key, value in HYDRA_DEFAULTS.items() if key not in given]


def _is_plain_override(argument: str, groups: set[str]) -> bool:
    key, equals, _ = argument.partition("=")
    if not equals or argument.startswith(("-", "+", "~")) or key.startswith("hydra"):
        return False
    return key.partition("@")[0] not in groups


def _config_groups(arguments: list[str]) -> set[str]:
    folders = [*shipped_folders(), *_user_folders(arguments)]
    return {sub.name for folder in folders if folder.is_dir() for sub in folder.iterdir() if sub.is_dir()}


def _user_folders(arguments: list[str]) -> list[Path]:
    folders = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
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
    except ConfigError as error:
        lines = str(error).splitlines()
        print(f"roll_gspo: {len(lines)} problem{'s' * (len(lines) > 1)} in the configuration", file=sys.stderr)
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
        _traceback_if_asked()
        code = 2
    except RollGspoError as error:
        print(f"roll_gspo: {error}", file=sys.stderr)
        _traceback_if_asked()
        code = 1
    if code:
        raise SystemExit(code)


def load_composed(composed: DictConfig) -> Loaded:
    """Validate what Hydra composed for this job."""
    info = HydraConfig.get()
    folders = [
        Path(source.path.removeprefix("file://")) for source in info.runtime.config_sources if source.schema == "file"
    ]
    name = (info.job.config_name or "").removesuffix(".yaml")
    primary = next((f / f"{name}.yaml" for f in folders if (f / f"{name}.yaml").is_file()), None)
    choices = {k: v for k, v in info.runtime.choices.items() if isinstance(v, str) and not k.startswith("hydra/")}
    where = sources.collect(primary, folders, choices, info.overrides.task)
    return load(composed, where, choices)


def run(loaded: Loaded) -> int:
    """Print the plan, then run the pipeline; the process's exit code."""
    from roll_gspo.pipelines import PIPELINES
    from roll_gspo.pipelines.plan import make_plan

    config = loaded.config
    plan = make_plan(config, loaded.warnings)
    print(plan.text(), flush=True)
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        return 0
    if plan.not_runnable:
        raise ConfigError("\n".join(plan.not_runnable))
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
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _run_in_a_process_of_its_own(arguments: list[str]) -> None:
    """One job of a --multirun: engines keep state in their process, so that each job needs a fresh one."""
    info = HydraConfig.get()
    flags = _flags_of(arguments)
    overrides = list(info.overrides.task)
    command = [sys.executable, "-m", "roll_gspo.run", *flags, *overrides]
    if not any(o.lstrip("+").startswith("run_name=") for o in overrides):
        command.append(f"run_name='{_run_name(overrides, info.job.num)}'")
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        command.append("--dry-run")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def _run_name(overrides: list[str], number: int) -> str:
    words = [o.lstrip("+").replace("=", "-").replace("/", "-") for o in overrides]
    return f"{number:03d}_" + "_".join(words)[:120] if words else f"{number:03d}"


def _flags_of(arguments: list[str]) -> list[str]:
    """The --config-* flags with their values, without --multirun and without overrides."""
    flags = []
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            flags.append(argument)
        takes_value = argument.startswith("--config") and "=" not in argument or argument in ("-cn", "-cd", "-cp")
    return [f for f in flags if f not in ("-m", "--multirun")]


def _traceback_if_asked() -> None:
    if os.environ.get("ROLL_GSPO_DEBUG"):
        traceback.print_exc()


if __name__ == "__main__":
    main()
