"""Differences between configurations, and labels for configurations that differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import yaml

from roll_gspo.printable import printable_line

Config = Mapping[str, object]
"""A run's config.yaml: nested, with all defaults."""

# Keys that do not change what a run computes, except for `seed`.
IGNORED_KEYS = frozenset(
    {
        *("seed", "exp_name", "run_name", "output_dir", "logging_dir", "resume_from_checkpoint", "checkpoint_config"),
        *("track_with", "tracker_kwargs", "tags", "log_samples_every", "profiler"),
    }
)
_MISSING = "—"
_MAX_KEYS_OF_LABEL, _MAX_VALUE = 3, 24
_MAX_LINES_OF_BLOCK = 12


class Difference(NamedTuple):
    """A key whose value is not the same in all configurations.

    Attributes:
        key: dotted path.
        values: one per configuration, as YAML; a dash if the key is missing.
    """

    key: str
    values: tuple[str, ...]


def config_identity(config: Config) -> str:
    """Return a text that is equal for runs that differ in their seed, names and folders only."""
    return yaml.safe_dump(_compared(config), sort_keys=True)


def differences(configs: Sequence[Config]) -> list[Difference]:
    """Return the keys whose values differ, in the order of the first configuration that has them.

    A block is one key if a configuration does not have it.
    """
    return _block_differences([_compared(config) for config in configs], "")


def count_equal(configs: Sequence[Config]) -> int:
    """Return the number of values that are the same in all configurations."""
    flat = [_leaves(_compared(config)) for config in configs]
    return sum(all(key in other and other[key] == value for other in flat) for key, value in flat[0].items())


def group_labels(configs: Sequence[Config], run_names: Sequence[str | None] = ()) -> list[str]:
    """Return a unique label per configuration.

    A label is the name of the run, the preset (`algorithm=...` of a --multirun) or `exp_name`. Configurations with the
    same name add the keys that distinguish them; the name is left out if all share it.

    Args:
        configs: one per group of runs.
        run_names: names that the user gave to runs that are alone in their group; None for other groups.
    """
    if run_names and None not in run_names and len(set(run_names)) == len(run_names):
        return [printable_line(str(name)) for name in run_names]
    names = [_preset(config) or str(config.get("exp_name") or "run") for config in configs]
    found = []
    for config, name in zip(configs, names, strict=True):
        namesakes = [other for other, other_name in zip(configs, names, strict=True) if other_name == name]
        keys = _distinguishing_keys(config, namesakes)
        parts = keys if keys and len(namesakes) == len(configs) else [name, *keys]
        found.append(printable_line(", ".join(parts)))
    counts, seen = Counter(found), Counter()
    for i, label in enumerate(found):
        if counts[label] > 1:
            seen[label] += 1
            found[i] = f"{label} (variant {seen[label]})"
    return found


def _compared(config: Config) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in IGNORED_KEYS}


def _block_differences(configs: Sequence[Mapping[str, object]], prefix: str) -> list[Difference]:
    found = []
    for key in dict.fromkeys(key for config in configs for key in config):
        path = f"{prefix}{key}"
        blocks = [value for config in configs if isinstance(value := config.get(key), Mapping)]
        if len(blocks) == len(configs):
            found += _block_differences(blocks, f"{path}.")
            continue
        texts = tuple(_text(config[key]) if key in config else _MISSING for config in configs)
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
    """Return `gspo` for a run that a --multirun named `000_algorithm-gspo_seed-0`."""
    match = re.match(r"(?:\d+_)?algorithm-(.+)", str(config.get("run_name") or ""))
    if not match:
        return None
    following = "|".join(re.escape(key) for key in config)
    return re.split(rf"_(?:{following})[-.]", match[1])[0]


def _distinguishing_keys(config: Config, namesakes: Sequence[Config]) -> list[str]:
    """Return `key=value` of the few keys that best distinguish a configuration from others of the same name.

    Keys are chosen greedily: each time the one that distinguishes the most configurations.
    """
    rows = differences(namesakes)
    chosen: list[Difference] = []

    def num_distinguished(candidate: Difference) -> int:
        return len(set(zip(*(row.values for row in [*chosen, candidate]), strict=True)))

    while len(chosen) < min(_MAX_KEYS_OF_LABEL, len(rows)):
        chosen.append(max((row for row in rows if row not in chosen), key=num_distinguished))
        if num_distinguished(chosen[0]) == len(namesakes):
            break
    own = next(i for i, other in enumerate(namesakes) if other is config)
    last = Counter(row.key.rpartition(".")[2] for row in rows)
    texts = []
    for row in chosen:
        name = row.key.rpartition(".")[2]
        texts.append(f"{name if last[name] == 1 else row.key}={' '.join(row.values[own].split())[:_MAX_VALUE]}")
    return texts
