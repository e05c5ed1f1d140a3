"""Checks of a model folder by its files alone, before torch is imported: weights, config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import CONFIG, declared_end_ids, read_object, text_config

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATES = "additional_chat_templates"  # folder of named chat templates
# Vocabularies that transformers reads without tokenizer.json.
_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# Tokenizer classes that define no special tokens in code.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NO_END = (
    "the model has no end-of-sequence token, so no response would end; set eos_token in tokenizer_config.json, or "
    "eos_token_id in generation_config.json"
)
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of `tokenizer.json`: ids of the base vocabulary and of added tokens, by token."""

    base: Mapping[str, int]
    added: Mapping[str, int]

    def __contains__(self, token: str) -> bool:
        return token in self.base or token in self.added


def check_folder(folder: Path, *, needs_safetensors: bool) -> None:
    """Check that a folder holds a whole model: config, weights and tokenizer.

    Args:
        folder: folder in Hugging Face layout.
        needs_safetensors: True if an engine reads only safetensors.

    Raises:
        ConfigError: a file is missing, damaged or truncated, or the files do not belong together.
    """
    config = text_config(read_object(folder / CONFIG))
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{folder / CONFIG}: model_type is missing; restore the file")
    shapes = _check_weights(folder, needs_safetensors)
    _check_shapes(folder, config, shapes)
    _check_tokenizer(folder, config)


def _check_weights(folder: Path, needs_safetensors: bool) -> dict[str, list[int]]:
    """Return the shapes of all tensors in safetensors files, after checking that every file is whole."""
    index = folder / f"{SAFETENSORS}.index.json"
    if index.is_file():
        shapes = _check_shards(folder, index)
    elif (folder / SAFETENSORS).is_file():
        shapes = _header_shapes(folder / SAFETENSORS)
    elif (folder / f"{PICKLED}.index.json").is_file() and not needs_safetensors:
        for name in _shard_names(folder / f"{PICKLED}.index.json").values():
            _require(folder, name, folder / f"{PICKLED}.index.json")
        return {}
    elif (folder / PICKLED).is_file() and not needs_safetensors:
        return {}
    else:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.gguf", "*.h5") for path in folder.glob(pattern))
        hint = f"convert {others[0]} to safetensors" if others else "download the model again, with its weights"
        raise ConfigError(f"{folder}: neither {SAFETENSORS} nor {index.name}; {hint}")
    return shapes


def _check_shards(folder: Path, index: Path) -> dict[str, list[int]]:
    names = _shard_names(index)
    shapes: dict[str, list[int]] = {}
    for name in dict.fromkeys(names.values()):
        _require(folder, name, index)
        shapes |= _header_shapes(folder / name)
    if missing := [tensor for tensor in names if tensor not in shapes]:
        raise ConfigError(
            f"{index}: names {len(missing)} tensors that no file holds, e.g. '{missing[0]}'; download the model again"
        )
    return shapes


def _shard_names(index: Path) -> dict[str, str]:
    """Return the file of each tensor in an index."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{index}: weight_map is missing or empty; download the model again")
    return names


def _require(folder: Path, name: str, index: Path) -> None:
    if not (folder / name).is_file():
        fix = "download it"
        if (folder / index.name.removesuffix(".index.json")).is_file():
            fix = "remove the index, which belongs to other weights"
        raise ConfigError(f"{index}: names the file {name}, which does not exist; {fix}")


def _header_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of a safetensors file, and compare the file's size with its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, max(size - 8, 0)):
            raise _damaged(path, f"{size} bytes are too few for its header")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(path, "its header is not readable") from error
    if size != (needed := 8 + length + end):
        raise _damaged(path, f"it has {size} bytes, and its header describes {needed}")
    return shapes


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: cannot be read as safetensors ({reason}); the file is damaged; download it again")


def _check_shapes(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Check the sizes that show whether `config.json` belongs to the weights."""
    if (found := shapes.get(_EMBEDDINGS)) is not None:
        wanted = [config.get("vocab_size"), config.get("hidden_size")]
        if None not in wanted and found != wanted:
            raise ConfigError(
                f"{folder / CONFIG}: vocab_size and hidden_size are {wanted[0]} and {wanted[1]}, but the embeddings of "
                f"the weights have the shape {found}; use files of one model"
            )
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    wanted_layers = config.get("num_hidden_layers")
    if layers and isinstance(wanted_layers, int) and len(layers) != wanted_layers:
        raise ConfigError(
            f"{folder / CONFIG}: num_hidden_layers is {wanted_layers}, but the weights have {len(layers)} layers; use "
            "files of one model"
        )


def _check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file():
            read_object(folder / name)
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        if not any((folder / name).is_file() for name in _VOCABULARIES) and not [*folder.glob("*.tiktoken")]:
            raise ConfigError(
                f"{folder}: has no tokenizer ({TOKENIZER} or one of {', '.join(_VOCABULARIES)}); copy the files of the "
                "model's tokenizer into it"
            )
        return
    size, largest = config.get("vocab_size"), max(vocabulary.base.values(), default=0)
    if isinstance(size, int) and largest >= size:
        raise ConfigError(
            f"{folder / TOKENIZER}: has the token id {largest}, but vocab_size in {CONFIG} is {size}; use the "
            "tokenizer of this model"
        )


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the tokens of `tokenizer.json`, or None if there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        vocab = content["model"]["vocab"]
        base = dict(vocab) if isinstance(vocab, dict) else {piece[0]: number for number, piece in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: has no vocabulary ({error!r}); restore the file") from error
    return Vocabulary(base, added)


def has_end_of_sequence(folder: Path) -> bool:
    """Return whether a model has a token that ends a response; True if only its tokenizer's code can tell.

    Raises:
        ConfigError: a file is damaged.
    """
    if declared_end_ids(folder):
        return True
    settings = tokenizer_settings(folder)
    tokens = settings.get("eos_token")
    if tokens is None and (folder / SPECIAL_TOKENS).is_file():
        tokens = read_object(folder / SPECIAL_TOKENS).get("eos_token")
    return tokens is not None or settings.get("tokenizer_class", "TokenizersBackend") not in _PLAIN_CLASSES


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`, empty if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    return read_object(path) if path.is_file() else {}


def chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a tokenizer by name; the standard one is called `default`.

    As in transformers, template files replace those of `tokenizer_config.json`.

    Raises:
        ConfigError: a file is damaged.
    """
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
    declared = tokenizer_settings(folder).get("chat_template")
    if isinstance(declared, list):
        return {str(entry["name"]): str(entry["template"]) for entry in declared}
    return {} if declared is None else {"default": str(declared)}
