"""Checks that run before any engine is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from roll_gspo.config.data import CHAT_TEMPLATES, SourceArgs
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.lora import PEFT
from roll_gspo.config.reward_table import shipped_name
from roll_gspo.config.sft import AnyConfig
from roll_gspo.config.strategy import StrategyArgs
from roll_gspo.data.hf_datasets import parse_dataset_name
from roll_gspo.data.templates import template_problem
from roll_gspo.environments.pool import EnvironmentPool
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.errors import ConfigError, DataError, MissingDependencyError, RewardError
from roll_gspo.models.folder_check import (
    NO_END,
    chat_templates,
    check_folder,
    has_end_of_sequence,
    read_vocabulary,
)
from roll_gspo.models.tiny import BUILTIN, CHAT_TEMPLATE, SPECIAL_TOKENS
from roll_gspo.pipelines.data_sources import chat_format
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.disk import check_disk
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.pretrain import check_model_name
from roll_gspo.pipelines.run_folder import RunFolder, check_writable, find_run_folder
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.roles.agents.program import AgentCommand
from roll_gspo.tracking.trackers import check_trackers

LOADS_A_MODEL = {"llm_judge", "reward_model"}


def check_start(config: AnyConfig, plan: Plan) -> RunFolder:
    """Check that the run can start on this machine; see `preflight`.

    Raises:
        ConfigError, DataError, MissingDependencyError: it cannot.
    """
    if plan.not_runnable:
        raise ConfigError("\n".join(map(str, plan.not_runnable)))
    return preflight(config)


def preflight(config: AnyConfig) -> RunFolder:
    """Check everything that can be checked before torch is imported: engines, models, data, folders, disk space.

    Returns:
        The folder of the run; nothing is written yet.

    Raises:
        MissingDependencyError, ConfigError, DataError: the first kind with a problem; lists all problems of that kind.
    """
    for check in CHECKS.values():
        check(config)
    return check_folders(config)


def check_folders(config: AnyConfig) -> RunFolder:
    """Check that the folders of the run can be written, and return them.

    Raises:
        ConfigError, CheckpointError: one cannot, or the checkpoint to resume from does not fit.
    """
    folder = find_run_folder(config)
    check_writable(folder.path, "output_dir")
    check_writable(folder.checkpoints, "checkpoint_config.output_dir")
    check_writable(folder.log_folder, "logging_dir")
    return folder


def check_rewards(config: AnyConfig) -> None:
    """Check that rewards and environments can be imported and built, each in a worker process. No model is loaded.

    A run builds them itself, after it has read the data. This is for a dry run.

    Raises:
        ConfigError, MissingDependencyError: the first reward that cannot.
    """
    if not isinstance(config, ExperimentConfig):
        return
    if config.agent is not None:
        AgentCommand.of(config.agent).check()
    for name, block in config.played_environments.items():
        spec, key = EnvironmentSpec(block.env_type, block.env_config, block.python), f"custom_envs.{name}"
        limits = block.timeout_s, key, block.start_timeout_s
        with closing(EnvironmentPool(spec, 1, 1, *limits)) as pool:
            pool.check(None, block.timeout_s + block.start_timeout_s)
    for domain, block in config.rewards.items():
        if not any(LOADS_A_MODEL & {shipped_name(worker)} for worker in block.workers.values()):
            key = f"rewards.{domain}"
            with closing(
                RewardPool(spec_from_config(block, key), 1, block.timeout_s, key, block.start_timeout_s)
            ) as pool:
                try:
                    pool.check()
                except RewardError as error:  # its module raises, exits or hangs
                    raise ConfigError(str(error)) from error


def check_engines(config: AnyConfig) -> None:
    """Check that the packages of every configured engine, of the executor and of the agent are installed.

    Raises:
        MissingDependencyError: lists each missing one with its `pip install` line.
    """
    missing = []
    if isinstance(config, ExperimentConfig) and config.agent is not None:
        lacking = [name for name in ("starlette", "uvicorn") if not _is_installed(name)]
        missing += (f"agent: needs the package '{name}': pip install 'roll-gspo[agents]'" for name in lacking)
    if config.execution == "ray" and not _is_installed("ray"):
        missing.append("execution: ray needs the package 'ray': pip install 'roll-gspo[ray]'; or execution=local")
    if config.actor_train.model_args.lora is not None and not _is_installed(PEFT.module):
        missing.append(f"actor_train.model_args.lora: needs the package '{PEFT.module}': {PEFT.install}")
    roles = config.roles().items()
    missing += (text for role, block in roles if (text := missing_engine(role, block.strategy_args)))
    if missing:
        raise MissingDependencyError("\n".join(missing))


def missing_engine(role: str, args: StrategyArgs) -> str | None:
    """Return the package of a role's engine that is not installed, with its `pip install` line; None if it is."""
    needs = args.requirement
    if needs is None or _is_installed(needs.module):
        return None
    return (
        f"{role}.strategy_args.strategy_name: {args.strategy_name} needs the package '{needs.module}': "
        f"{needs.install}; or strategy=hf for plain transformers"
    )


def check_models(config: AnyConfig) -> None:
    """Check that every role's model exists, by its files. Names on the Hugging Face hub are not looked up.

    Raises:
        ConfigError: a `builtin:` name is unknown, or a folder is missing or holds no whole model.
    """
    safetensors: dict[str, bool] = {}
    for name, role in config.roles().items():
        model, own = model_of(config, role), role.model_args.model_name_or_path
        key = f"{name}.model_args.model_name_or_path" if model == own else "pretrain"
        check_model_name(model, key)
        safetensors[model] = safetensors.get(model, False) or role.strategy_args.reads_only_safetensors
    for model, needs_safetensors in safetensors.items():
        if Path(model).is_dir():
            check_folder(Path(model), needs_safetensors=needs_safetensors)


def check_templates(config: AnyConfig) -> None:
    """Check that the model of `actor_train` has the chat templates in use and a token that ends a response.

    Names on the Hugging Face hub are not looked up.

    Raises:
        DataError: a template is missing or broken, or needs tokens that the tokenizer lacks.
        ConfigError: no token ends a response.
    """
    model = model_of(config, config.actor_train)
    templates = {
        (key, template.name): template
        for key, block in data_blocks(config).items()
        for template in chat_format(config, block).templates().values()
    }
    if model.startswith(BUILTIN):
        own, vocabulary = {"default": CHAT_TEMPLATE}, frozenset(SPECIAL_TOKENS)
    elif Path(model).is_dir():
        own, vocabulary = chat_templates(Path(model)), read_vocabulary(Path(model))
        if not any(template.end_of_turn for template in templates.values()) and not has_end_of_sequence(Path(model)):
            raise ConfigError(f"{model}: {NO_END}")
    else:
        return
    for (key, _), template in templates.items():
        known = vocabulary if vocabulary is not None else template.tokens  # only the tokenizer's code can tell
        if (problem := template_problem(template, own, known)) is not None:
            raise DataError(f"{key}: {problem}")


def data_blocks(config: AnyConfig) -> dict[str, SourceArgs]:
    """Return every `data_args` block by the key of its files."""
    blocks: dict[str, SourceArgs] = {"actor_train.data_args.file_name": config.actor_train.data_args}
    if config.validation is not None:
        blocks["validation.data_args.file_name"] = config.validation.data_args
    return blocks


def check_data_files(config: AnyConfig) -> None:
    """Check that every data file and chat template exists. Their contents are checked when they are read.

    Names on the Hugging Face hub are not looked up.

    Raises:
        DataError: lists each missing one with the key that names it.
        MissingDependencyError: a name or a folder for the `datasets` library, and it is not installed.
    """
    check_files(config, data_blocks(config))


def check_files(config: AnyConfig, blocks: Mapping[str, SourceArgs]) -> None:
    """Check that files and chat templates of `data_args` blocks exist. `blocks` maps the key of the files to a block.

    Raises:
        DataError: lists each missing one.
        MissingDependencyError: a name or a folder for the `datasets` library, and it is not installed.
    """
    missing = [
        f"{key}: {name} cannot be read (no such file); set {key} to a JSONL file"
        for key, block in blocks.items()
        for name in block.file_name
        if not name.startswith(BUILTIN) and not Path(name).exists() and parse_dataset_name(name) is None
    ]
    templates = {key.replace("file_name", "template"): [block.template] for key, block in blocks.items()}
    templates |= {"global_template": [config.global_template], "tag_to_template": [*config.tag_to_template.values()]}
    missing += [
        f"{key}: {name} cannot be read (no such file); name a file, or one of {', '.join(CHAT_TEMPLATES)}"
        for key, names in templates.items()
        for name in names
        if name is not None and name not in CHAT_TEMPLATES and not Path(name).is_file()
    ]
    if missing:
        raise DataError("\n".join(missing))
    named = [name for block in blocks.values() for name in block.file_name if parse_dataset_name(name) is not None]
    if named and not _is_installed("datasets"):
        raise MissingDependencyError(
            f"{named[0]} needs the package 'datasets': pip install 'roll-gspo[data]'; or name JSONL files"
        )


CHECKS: Mapping[str, Callable[[AnyConfig], None]] = {
    "packages": check_engines,
    "trackers": lambda config: check_trackers(config.track_with, config.tracker_options),
    "models": check_models,
    "data": check_data_files,
    "templates": check_templates,
    "disk": check_disk,
}
"""The checks of `preflight` in their order, by topic."""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False
