"""What tells configurations apart, and what to call those who differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import yaml

Config = Mapping[str, object]
"""A run's config.yaml: nested, with every default written out."""

# Where a run lies and what it is called, not what it does.
LEFT_OUT = frozenset(
    {
        *("seed", "exp_name", "run_name", "output_dir", "logging_dir", "resume_from_checkpoint", "checkpoint_config"),
        *("track_with", "tracker_kwargs"),
    }
)
_ABSENT = "—"
_MAX_KEYS_OF_LABEL, _MAX_VALUE = 3, 24
_MAX_LINES_OF_BLOCK = 12


class Difference(NamedTuple):
    """A key that has not the same value everywhere.

    Attributes:
        key: dotted path.
        values: one a configuration, as YAML; a dash where the key is not there.
    """

    key: str
    values: tuple[str, ...]


def identity(config: Config) -> str:
    """Equal for runs that differ in their seed, their names and their folders only."""
    return yaml.safe_dump({key: value for key, value in config.items() if key not in LEFT_OUT}, sort_keys=True)


def differences(configs: Sequence[Config]) -> list[Difference]:
    """Keys whose values differ, in the order of the first configuration that has them; blocks count as one key
    where some configuration has none of it."""
    return _differences([{k: v for k, v in c.items() if k not in LEFT_OUT} for c in configs], "")


def num_equal(configs: Sequence[Config]) -> int:
    """How many values all of the configurations share."""
    flat = [_leaves({k: v for k, v in config.items() if k not in LEFT_OUT}) for config in configs]
    return sum(all(key in other and other[key] == value for other in flat) for key, value in flat[0].items())


def labels(configs: Sequence[Config]) -> list[str]:
    """A name for each of the configurations, none of them twice.

    The preset (`algorithm=...` of a --multirun) or `exp_name`, where these differ; then what tells apart those that
    share it.
    """
    names = [_preset(config) or str(config.get("exp_name") or "run") for config in configs]
    found = []
    for config, name in zip(configs, names, strict=True):
        namesakes = [other for other, its_name in zip(configs, names, strict=True) if its_name == name]
        telling = _telling(config, namesakes)
        parts = telling if telling and len(namesakes) == len(configs) else [name, *telling]
        found.append(", ".join(parts))
    counts, seen = Counter(found), Counter()
    for i, label in enumerate(found):
        if counts[label] > 1:
            seen[label] += 1
            found[i] = f"{label} (variant {seen[label]})"
    return found


def _differences(configs: Sequence[Mapping[str, object]], prefix: str) -> list[Difference]:
    found = []
    for key in dict.fromkeys(key for config in configs for key in config):
        path = f"{prefix}{key}"
        blocks = [value for config in configs if isinstance(value := config.get(key), Mapping)]
        if len(blocks) == len(configs):
            found += _differences(blocks, f"{path}.")
            continue
        texts = tuple(_text(config[key]) if key in config else _ABSENT for config in configs)
        if len(set(texts)) > 1:
            found.append(Difference(path, texts))
    return found


def _text(value: object) -> str:
    if not isinstance(value, Mapping | list):
        return yaml.safe_dump(value, width=1000).removesuffix("...\n").strip()
    lines = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000).strip().splitlines()
    hidden = len(lines) - _MAX_LINES_OF_BLOCK
    return "\n".join(lines[:_MAX_LINES_OF_BLOCK] + ([f"... {hidden} more lines"] if hidden > 0 else []))


def _leaves(block: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _preset(config: Config) -> str | None:
    """`gspo` of a run that a --multirun named 000_algorithm-gspo_seed-0."""
    match = re.match(r"(?:\d+_)?algorithm-(.+)", str(config.get("run_name") or ""))
    if not match:
        return None
    following = "|".join(re.escape(key) for key in config)
    return re.split(rf"_(?:{following})[-.]", match[1])[0]


def _telling(config: Config, namesakes: Sequence[Config]) -> list[str]:
    """`key=value` of few keys that tell a configuration apart from its namesakes: each time the key that tells most."""
    rows = differences(namesakes)
    chosen: list[Difference] = []

    def num_told(candidate: Difference) -> int:
        return len(set(zip(*(row.values for row in [*chosen, candidate]), strict=True)))

    while len(chosen) < min(_MAX_KEYS_OF_LABEL, len(rows)):
        chosen.append(max((row for row in rows if row not in chosen), key=num_told))
        if num_told(chosen[0]) == len(namesakes):
            break
    own = next(i for i, other in enumerate(namesakes) if other is config)
    last = Counter(row.key.rpartition(".")[2] for row in rows)
    words = []
    for row in chosen:
        name = row.key.rpartition(".")[2]
        words.append(f"{name if last[name] == 1 else row.key}={' '.join(row.values[own].split())[:_MAX_VALUE]}")
    return words
