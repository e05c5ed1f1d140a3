"""JSON files of a model folder, and the facts that several engines read from them (no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ConfigError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # `ValueError` includes text that is not UTF-8
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}{line}: is not valid JSON ({reason}); restore the file") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is no JSON object, but {type(value).__name__}; restore the file")
    return value


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the decoder: those of `text_config` in models that also read images or sound."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def declared_end_ids(folder: Path) -> frozenset[int]:
    """Return every end-of-sequence id that `config.json` and `generation_config.json` declare.

    Raises:
        ConfigError: a file is damaged, or an id is no token id.
    """
    found: set[int] = set()
    for name in (CONFIG, GENERATION_CONFIG):
        if (folder / name).is_file():
            declared = text_config(read_object(folder / name)).get("eos_token_id")
            ids = declared if isinstance(declared, list) else [declared]
            for number in ids:
                if number is not None and (type(number) is not int or number < 0):
                    message = f"eos_token_id is {declared!r}; write a token id, a list of them, or null"
                    raise ConfigError(f"{folder / name}: {message}")
            found |= {number for number in ids if number is not None}
    return frozenset(found)


def end_of_sequence_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return every id that ends a response of a model: those of its files and that of its tokenizer, sorted.

    All engines use these ids and no others.

    Raises:
        ConfigError: a file is damaged.
    """
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted(declared_end_ids(folder).union(own)))
