"""Find and read runs, and group those that differ in their seed only."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from roll_gspo.compare.differences import Config, config_identity, group_labels
from roll_gspo.errors import DataError
from roll_gspo.printable import printable_line
from roll_gspo.report.html_page import plural
from roll_gspo.report.run_folder import Points, RunFolder, read_run

_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it was found.
        config: its config.yaml.
        record: its metrics.
    """

    folder: Path
    config: Config
    record: RunFolder

    @property
    def seed(self) -> str:
        """The configured seed."""
        return printable_line(str(self.config.get("seed", "unknown")))

    @property
    def name(self) -> str:
        """`run_name` of the configuration, else the name of the folder."""
        return printable_line(str(self.config.get("run_name") or self.folder.resolve().name))

    @property
    def commit(self) -> str:
        """The git commit of the process that wrote the last step; empty if unknown."""
        return str(self.record.launches[-1].get("commit", "")) if self.record.launches else ""

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return self.record.steps[-1]

    @property
    def max_steps(self) -> int | None:
        """The configured number of steps, if there is one."""
        value = self.config.get("max_steps")
        return value if isinstance(value, int) else None

    @property
    def is_short(self) -> bool:
        """True if fewer steps were logged than configured."""
        return self.max_steps is not None and self.last_step < self.max_steps

    def points(self, names: Sequence[str]) -> Points:
        """Return the first of the metrics that the run has; empty if it has none."""
        return self.record.first_points(names)


@dataclass(frozen=True)
class Group:
    """Runs whose configurations differ in their seed only. A group is one curve.

    Attributes:
        label: unique on the page.
        runs: at least one, ordered by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def has_distinct_seeds(self) -> bool:
        """True if no two runs have the same seed."""
        return len({run.seed for run in self.runs}) == len(self.runs)

    @property
    def num_runs(self) -> str:
        """`3 seeds`, or `3 runs` if two runs have the same seed."""
        return plural(len(self.runs), "seed" if self.has_distinct_seeds else "run")


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of runs: the paths themselves, or all folders of runs below them, each once.

    Raises:
        DataError: a path does not exist, or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; give output folders of runs, or a folder that contains runs")
        below = []
        for folder, names, files in os.walk(path):
            names.sort()
            if _METRICS in files:
                names.clear()  # the checkpoints and rollouts of a run contain no runs
                below.append(Path(folder))
        if not below:
            raise DataError(
                f"{path}: no run in it or below it (a run's folder holds {_METRICS}); give output folders of runs, "
                "e.g. output/example_gspo"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def load_run(folder: Path) -> Run:
    """Read the metrics and the configuration of a run.

    Raises:
        DataError: config.yaml is missing or not a run's configuration.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(
            f"{folder}: no config.yaml, which decides whether runs differ in their seed only; restore it, or give the "
            "folders of the other runs"
        )
    record = read_run(folder, num_rollouts=0)
    try:
        config = yaml.safe_load(record.config)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}); restore the run's file") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a run's configuration (a {type(config).__name__}); restore the run's file")
    return Run(folder, config, record)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return the groups, ordered by their first run."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(config_identity(run.config), []).append(run)
    groups = list(members.values())
    names = group_labels([group[0].config for group in groups], [_own_name(group) for group in groups])
    return [
        Group(label, tuple(sorted(group, key=lambda run: (len(run.seed), run.seed))))
        for label, group in zip(names, groups, strict=True)
    ]


def _own_name(group: Sequence[Run]) -> str | None:
    """Return the `run_name` that the user gave to the only run of a group; a --multirun names runs `000_key-value`."""
    name = group[0].config.get("run_name")
    return str(name) if name and len(group) == 1 and not re.match(r"\d+_", str(name)) else None
