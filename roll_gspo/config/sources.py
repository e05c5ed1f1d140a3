"""Locations of the keys of a composed configuration: file and line, or the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from roll_gspo.config.base import Problem


@dataclass(frozen=True)
class Sources:
    """The files and command-line overrides of a composed configuration.

    `files` are in order of precedence, highest first; `option_files` are those that are options of groups. `shadowed`
    has pairs of a file that is used and one of the same name that it replaces.
    """

    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    option_files: tuple[Path, ...] = ()
    shadowed: tuple[tuple[Path, Path], ...] = ()

    def locate(self, path: tuple[str, ...]) -> str:
        """Return `file:line: ` or `command line: ` of the nearest enclosing key that is set, or ''."""
        return self._on_command_line(path) or self.in_files(path)

    def locate_any(self, paths: list[tuple[str, ...]]) -> str:
        """Return the location of the first key that is set; keys on the command line have precedence."""
        found = (self._on_command_line(path) for path in paths)
        return next(filter(None, found), "") or next(filter(None, map(self.in_files, paths)), "")

    def set_by_option(self, path: tuple[str, ...]) -> bool:
        """Return whether only group options set this key, not the command line or a file of the user."""
        files = (file for file in self.files if _line_of(file, path) is not None)
        choices = {f"{file.parent.name}={file.stem}" for file in self.option_files}  # `validation` is a key, too
        keys = [override for override in self.overrides if override.lstrip("+") not in choices]
        return not _override_of(path, keys) and next(files, None) in self.option_files

    def line(self, problem: Problem) -> str:
        """Return `file:line: key: message` of a problem whose keys are full paths."""
        keys = [tuple(key.split(".")) for key in (problem.key, *problem.also)]
        return f"{self.locate_any(keys)}{problem.key}: {problem.message}"

    def replacements(self) -> Iterator[str]:
        """Yield a warning per used file that replaces one of the same name in another folder."""
        for used, replaced in self.shadowed:
            yield f"{_short(used)} replaces {_short(replaced)}, which has the same name"

    def idle_options(self, unread: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield (group, option) of the chosen options whose every key is one of `unread`."""
        for file in self.option_files:
            found = _top_level_keys(file)
            if found and found <= set(unread):
                yield file.parent.name, file.stem

    def _on_command_line(self, path: tuple[str, ...]) -> str:
        override = _override_of(path, self.overrides)
        return f"command line ({override.lstrip('+')}): " if override else ""

    def in_files(self, path: tuple[str, ...]) -> str:
        """Return `file:line: ` of the nearest enclosing key in a file, or ''."""
        for depth in range(len(path), 0, -1):
            for file in self.files:
                line = _line_of(file, path[:depth])
                if line is not None:
                    return f"{_short(file)}:{line}: "
        return ""


def collect(name: str, folders: Iterable[Path], choices: dict[str, str], overrides: Iterable[str]) -> Sources:
    """Find the files of a composed configuration.

    Args:
        name: the configuration; the files that its defaults list names are added recursively.
        folders: search path, highest precedence first.
        choices: chosen option per config group.
        overrides: keys set on the command line.
    """
    folders = list(dict.fromkeys(folders))
    files: list[Path] = []
    shadowed: list[tuple[Path, Path]] = []

    def find(name: str) -> Path | None:
        candidates = [folder / f"{name}.yaml" for folder in folders]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if found and found[0] not in files:
            shadowed.extend((found[0], other) for other in found[1:])
        return found[0] if found else None

    def follow(file: Path | None) -> None:
        if file is None or file in files:
            return
        files.append(file)
        for item in reversed(_defaults_of(file)):
            if isinstance(item, str) and item != "_self_":
                follow(find(item.removeprefix("/")))

    follow(find(name))
    num_written = len(files)
    for group, choice in choices.items():
        if choice and not group.startswith("hydra/"):
            follow(find(f"{group}/{choice}"))
    return Sources(tuple(files), tuple(overrides), tuple(files[num_written:]), tuple(shadowed))


def _override_of(path: tuple[str, ...], overrides: Sequence[str]) -> str:
    """Return the last override that sets a key, or ''."""
    dotted = ".".join(path)
    for override in reversed(overrides):
        key = override.lstrip("+~").partition("=")[0]
        if key == dotted or dotted.startswith(key + ".") or key.startswith(dotted + "."):
            return override
    return ""


def _defaults_of(file: Path) -> list[Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    defaults = document.get("defaults", []) if isinstance(document, dict) else []
    return defaults if isinstance(defaults, list) else []


def _top_level_keys(file: Path) -> set[str]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return set()
    return {str(key) for key in document} - {"defaults"} if isinstance(document, dict) else set()


def _line_of(file: Path, path: tuple[str, ...]) -> int | None:
    try:
        node: Any = _node_of(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        pair = next(((k, v) for k, v in node.value if k.value == part), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


@lru_cache(maxsize=64)  # one error looks up many keys in the same files
def _node_of(text: str) -> Any:
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _short(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
