"""The checkpoint that a run starts from: a local folder, a download, or a tiny generated model."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from roll_gspo.config.roles import WarmStart
from roll_gspo.config.run import RunConfig
from roll_gspo.errors import ConfigError
from roll_gspo.models import tiny
from roll_gspo.models.folder_check import check_folder
from roll_gspo.registry import did_you_mean
from roll_gspo.tracking.console import Console

MAKER_VERSION = 1  # increment when the recipe below produces a different model
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def prepare_checkpoint(config: RunConfig, name: str, console: Console, key: str = "pretrain") -> Path:
    """Return a folder in Hugging Face layout (config.json, safetensors, tokenizer) for a model name.

    Args:
        config: settings and location of a `builtin:` model.
        name: value of `pretrain` or `model_name_or_path`.
        console: shows the progress of slow stages.
        key: configuration key that holds the name.

    Raises:
        ConfigError: the model does not exist or cannot be downloaded.
    """
    check_model_name(name, key)
    if name.startswith(tiny.BUILTIN):
        return _builtin(config, name.removeprefix(tiny.BUILTIN), console)
    if Path(name).is_dir():
        return Path(name)
    with console.stage(f"download {name}"):
        folder = _download(name, key)
    check_folder(folder, needs_safetensors=False)
    return folder


def check_model_name(name: str, key: str = "pretrain") -> None:
    """Check that `name` is a `builtin:` model, a model folder, or `organisation/model` on the hub.

    Raises:
        ConfigError: `name` is none of these.
    """
    local = Path(name)
    if name.startswith(tiny.BUILTIN):
        known = sorted(tiny.TINY_MODELS)
        if (builtin := name.removeprefix(tiny.BUILTIN)) not in known:
            raise ConfigError(
                f"{key}: unknown builtin model '{builtin}'{did_you_mean(builtin, known)} (known: {', '.join(known)})"
            )
    elif local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"{key}: {local} has no config.json; give a folder in Hugging Face layout")
    elif local.exists():
        raise ConfigError(f"{key}: {local} is a file; give a folder in Hugging Face layout")
    elif not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: no folder '{name}'; give one in Hugging Face layout, or a name on the hub")


def _download(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: '{name}' is neither a local folder nor to be had from the Hugging Face hub ({first_line}); "
            "check the name, or download it and give the folder"
        ) from error


def builtin_folder(config: RunConfig, name: str) -> Path:
    """Return the folder that a `builtin:` model is made in, or was by an earlier run."""
    warm = config.warm_start
    mark = tiny.fingerprint(
        MAKER_VERSION,
        dict(tiny.TINY_MODELS[name].hf_config),
        tiny.SPECIAL_TOKENS,
        tiny.CHAT_TEMPLATE,
        warm.model_dump() if warm else None,
    )
    return Path(config.output_dir) / "pretrained" / f"{name}-{mark}"


def _builtin(config: RunConfig, name: str, console: Console) -> Path:
    spec, warm, folder = tiny.TINY_MODELS[name], config.warm_start, builtin_folder(config, name)
    if folder.is_dir():
        console.message(f"model: {folder} (made by an earlier run)")
        return folder
    with console.stage("import torch and transformers"):
        tokenizer = tiny.byte_tokenizer()
        model = tiny.build_model(spec, warm.seed if warm else 0)
    if warm is not None:
        with console.stage("warm start") as progress:
            loss = _warm_start(model, tokenizer, warm, progress)
        console.message(f"warm start: {warm.steps} steps, loss {loss:.3f} nats per token")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    tiny.save(model, tokenizer, aside)
    (aside / "made_by.json").write_text(json.dumps({"warm_start": warm.model_dump() if warm else None}))
    try:
        aside.rename(folder)
    except OSError:  # another run made it meanwhile
        shutil.rmtree(aside)
    return folder


def _warm_start(model: Any, tokenizer: Any, settings: WarmStart, progress: Any) -> float:
    from roll_gspo.data import column_addition, multi_domain
    from roll_gspo.environments import adding_machine, calculated_sums, frozen_lake, sokoban
    from roll_gspo.models.warm_start import train

    tasks = {
        column_addition.FILE_NAME: column_addition.demonstrations,
        multi_domain.FILE_NAME: multi_domain.demonstrations,
        "adding_machine": adding_machine.demonstrations,
        calculated_sums.NAME: calculated_sums.demonstrations,
        "frozen_lake": frozen_lake.demonstrations,
        "sokoban": sokoban.demonstrations,
    }
    num = settings.steps * settings.batch_size
    made = tasks[settings.demonstrations](num, settings.seed, settings.slip_probability)
    encoded = [_demonstration(tokenizer, conversation) for conversation in made]
    return train(
        model,
        encoded,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        pad=tokenizer.pad_token_id,
        progress=progress,
    )


def _demonstration(tokenizer: Any, conversation: tuple[str, str] | list[dict[str, str]]) -> Any:
    """Encode a question with its answer, or the messages of an episode, as an episode is recorded."""
    from roll_gspo.data.prompts import encode_chat
    from roll_gspo.data.templates import NATIVE, TEMPLATES
    from roll_gspo.data.turns import TokenRecord, TurnRenderer
    from roll_gspo.models.warm_start import Demonstration

    if isinstance(conversation, tuple):
        question, answer = conversation
        conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    first = next(i for i, message in enumerate(conversation) if message["role"] == "assistant")
    record = TokenRecord(tuple(encode_chat(tokenizer, conversation[:first])))
    renderer = TurnRenderer(tokenizer, TEMPLATES[NATIVE])
    for i in range(first, len(conversation), 2):
        answer_ids = tokenizer.encode(conversation[i]["content"], add_special_tokens=False)
        record.add_answer([*answer_ids, tokenizer.eos_token_id], [0.0] * (len(answer_ids) + 1), ())
        if new := conversation[i + 1 : i + 2]:
            record.add_given(renderer.following(conversation[: i + 1], new, tokenizer.eos_token_id))
    return Demonstration(record.prompt_ids, tuple(record.token_ids), tuple(record.mask))
