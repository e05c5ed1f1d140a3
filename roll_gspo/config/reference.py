"""Fill the tables of configuration keys in the documentation from the schema.

    python -m roll_gspo.config.reference docs            # write the tables
    python -m roll_gspo.config.reference docs --check    # exit status 1 if a page is out of date

The text of the pages is written by hand. A table stands between two comments; its name is the key path of a block
(`actor_train.training_args`), a group of flat keys (`run`, `batch`, `algorithm`) or an engine (`vllm`). Keys in
brackets select a part of the block:

    <!-- table: algorithm (adv_estimator, gamma, lambd) -->
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from roll_gspo.config.algorithm import AlgorithmConfig
from roll_gspo.config.asynchronous import AsyncConfig
from roll_gspo.config.batch import BatchConfig
from roll_gspo.config.blocks import models_in
from roll_gspo.config.environments import EpisodeConfig
from roll_gspo.config.legacy import IGNORED, IGNORED_WITHOUT, LATER_VALUES, NOT_SUPPORTED_YET, reader_text
from roll_gspo.config.pipelines import shipped_config_classes
from roll_gspo.config.run import RunConfig
from roll_gspo.config.strategy import StrategyArgs, shipped_engines
from roll_gspo.declarations import EXTENSIBLE
from roll_gspo.errors import RollGspoError
from roll_gspo.registry import did_you_mean

FLAT: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "batch": BatchConfig,
    "async": AsyncConfig,
    "episodes": EpisodeConfig,
    "algorithm": AlgorithmConfig,
}
NAMED_BY_USER = {"rewards": ".DOMAIN", "parts": ".NAME", "custom_envs": ".NAME"}
READ_FROM_TEXT = {  # keys whose validator accepts more than their type
    "device_mapping": "devices or null",
    "overlong_buffer_length": "integer > 0, number < 1 or null",
    **dict.fromkeys(("use_pg_clip_range", "dual_clip_loss"), "boolean or `auto`"),
    **dict.fromkeys(
        ("file_name", "tag_included", "sources", "track_with", "tags", "forward_env"), "string or list of strings"
    ),
}
TABLE = re.compile(
    r"<!-- table: (?P<name>[\w.]+)(?: \((?P<keys>[^)]*)\))? -->\n(?P<rows>.*?)<!-- end of table -->", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of the schema and the keys that its table shows.

    Attributes:
        model: the class of the block.
        keys: all its keys, or those that it adds to the block of the same path in another pipeline.
    """

    model: type[BaseModel]
    keys: tuple[str, ...]


def fill_tables(text: str, page: str) -> str:
    """Return the text of a page with every table filled from the schema.

    Args:
        text: Markdown.
        page: name of the page, for error messages.

    Raises:
        RollGspoError: if a marker names an unknown table or key.
    """

    def filled(match: re.Match[str]) -> str:
        head = match[0].partition("\n")[0]
        return f"{head}\n{_table(match['name'], match['keys'], page)}\n<!-- end of table -->"

    return TABLE.sub(filled, text)


def missing_keys(texts: list[str]) -> list[str]:
    """Return `block.key` of every key of the schema that no table of the given pages shows."""
    blocks = _blocks()
    shown: set[tuple[type[BaseModel], str]] = set()
    for match in (match for text in texts for match in TABLE.finditer(text)):
        if block := blocks.get(match["name"]):
            shown |= {(block.model, key) for key in _selected(match["keys"]) or block.keys}
    return [f"{name}.{key}" for name, block in blocks.items() for key in block.keys if (block.model, key) not in shown]


def _selected(keys: str | None) -> tuple[str, ...]:
    return tuple(key.strip() for key in keys.split(",")) if keys else ()


def _blocks() -> dict[str, Block]:
    """Return every block that a table can show, by name."""
    blocks = {name: Block(model, tuple(model.model_fields)) for name, model in FLAT.items()}
    inherited = {key for block in blocks.values() for key in block.keys}
    for pipeline, root in shipped_config_classes().items():
        own = (key for key in root.model_fields if key in root.__annotations__ or key not in inherited)
        blocks[pipeline] = Block(root, tuple(own))
        for path, model in _blocks_below(root, ""):
            if path not in blocks:
                blocks[path] = Block(model, tuple(model.model_fields))
            elif model is not blocks[path].model:
                blocks.setdefault(f"{pipeline}.{path}", Block(model, tuple(model.__annotations__)))
    return blocks


def _blocks_below(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (key path, class) of every block below `model`; the options of an engine have its name as path."""
    for key, info in model.model_fields.items():
        for block in models_in(info.annotation):
            if issubclass(block, StrategyArgs):
                for name, engine in shipped_engines(block).items():
                    (options,) = models_in(engine.model_fields["strategy_config"].annotation)
                    yield name, options
            else:
                path = f"{prefix}{key}{NAMED_BY_USER.get(key, '')}"
                yield path, block
                yield from _blocks_below(block, f"{path}.")


def _table(name: str, keys: str | None, page: str) -> str:
    """Return the Markdown table of a block, or of one of ROLL's lists of keys."""
    if name in ROLL_TABLES:
        return "\n".join(ROLL_TABLES[name]())
    blocks = _blocks()
    if name not in blocks:
        known = sorted({*blocks, *ROLL_TABLES})
        raise RollGspoError(f"{page}: no table '{name}'{did_you_mean(name, known)}; choose from {', '.join(known)}")
    block = blocks[name]
    selected = _selected(keys) or block.keys
    if unknown := set(selected) - set(block.keys):
        raise RollGspoError(f"{page}: table '{name}' has no key {', '.join(sorted(unknown))}; correct the marker")
    properties = block.model.model_json_schema()["properties"]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in selected:
        meaning = " ".join((block.model.model_fields[key].description or "").split()) + _readers(block.model, key)
        rows.append(_row(f"`{key}`", _type(key, block.model, properties[key]), _default(block.model, key), meaning))
    return "\n".join(rows)


def _readers(model: type[BaseModel], key: str) -> str:
    """Return with which functions a key of the algorithm is used, according to their declarations."""
    for selector, functions in EXTENSIBLE.items() if model is AlgorithmConfig else ():
        if names := functions.readers(key):
            return f" Used only with `{selector}` {', '.join(f'`{name}`' for name in names)}."
    return ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(model: type[BaseModel], key: str) -> str:
    info = model.model_fields[key]
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    return "its defaults" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(list(value) if isinstance(value, tuple) else value)


def _type(key: str, model: type[BaseModel], schema: dict[str, Any]) -> str:
    """Describe the JSON schema of a key in words."""
    options = schema.get("anyOf", [schema])
    if key in READ_FROM_TEXT:
        return READ_FROM_TEXT[key]
    if blocks := models_in(model.model_fields[key].annotation):
        engines = [name for block in blocks if issubclass(block, StrategyArgs) for name in shipped_engines(block)]
        kind = (
            f"block; `strategy_name` {', '.join(f'`{name}`' for name in engines)} or a dotted path"
            if engines
            else "block"
        )
        kind = "blocks by name" if schema.get("type") == "object" else kind
        return kind + (" or null" if {"type": "null"} in options else "")
    return " or ".join(_alternative(option) for option in options)


def _alternative(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    name = "map" if schema["type"] == "object" else schema.get("format", schema["type"])
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return " ".join([name, ", ".join(limits)]).strip()


def _ignored_keys() -> Iterator[str]:
    yield "| key | why |"
    yield "|---|---|"
    without = {key: f"{reader_text(*reader)}; read there" for key, reader in IGNORED_WITHOUT.items()}
    yield from (_row(f"`{key}`", reason) for key, reason in sorted((IGNORED | without).items()))


def _unsupported_keys() -> Iterator[str]:
    yield "| key | feature | accepted values |"
    yield "|---|---|---|"
    for key, later in sorted(NOT_SUPPORTED_YET.items()):
        yield _row(f"`{key}`", later.feature, ", ".join(f"`{_yaml(value)}`" for value in later.off))
    for key, values in sorted(LATER_VALUES.items()):
        for value, feature in values.items():
            yield _row(f"`{key}: {value}`", feature, "")


ROLL_TABLES = {"ignored_roll_keys": _ignored_keys, "unsupported_roll_keys": _unsupported_keys}


def main(arguments: list[str] | None = None) -> int:
    """Fill the tables of every page below a folder, or check that they are current; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m roll_gspo.config.reference", description="Fill the tables of configuration keys."
    )
    parser.add_argument("folder", type=Path, help="folder of the documentation")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    options = parser.parse_args(arguments)
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(options.folder.rglob("*.md"))}
    try:
        filled = {path: fill_tables(text, str(path)) for path, text in pages.items()}
        if missing := missing_keys(list(filled.values())):
            raise RollGspoError(f"{options.folder}: no table shows {', '.join(missing)}; add them to a page")
    except RollGspoError as error:
        print(error, file=sys.stderr)
        return 1
    outdated = [path for path in pages if filled[path] != pages[path]]
    for path in outdated:
        if not options.check:
            path.write_text(filled[path], encoding="utf-8")
        print(f"{path}: {'out of date' if options.check else 'written'}")
    return int(bool(outdated) and options.check)


if __name__ == "__main__":
    sys.exit(main())
