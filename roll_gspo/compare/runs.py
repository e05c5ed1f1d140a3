"""Find runs, read them, and put together those that differ in their seed only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from roll_gspo.compare.differences import Config, identity, labels
from roll_gspo.errors import DataError
from roll_gspo.report.run_folder import Points, RunFolder, read_run

METRICS = "metrics.jsonl"


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
        """As configured."""
        return str(self.config.get("seed", "unknown"))

    @property
    def last_step(self) -> int:
        """The last one that was logged."""
        return self.record.steps[-1]

    @property
    def max_steps(self) -> int | None:
        """How many it was to make, where the configuration says so."""
        value = self.config.get("max_steps")
        return value if isinstance(value, int) else None

    def points(self, names: Sequence[str]) -> Points:
        """(step, value) of the first of the metrics that the run has; empty where it has none."""
        return next((points for name in names if (points := self.record.points(name))), [])


@dataclass(frozen=True)
class Group:
    """Runs whose configurations differ in their seed only: one curve.

    Attributes:
        label: unique on the page.
        runs: at least one, by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def has_distinct_seeds(self) -> bool:
        """Whether no seed is there twice."""
        return len({run.seed for run in self.runs}) == len(self.runs)

    @property
    def num_runs(self) -> str:
        """`3 seeds`; `3 runs` where a seed is there twice."""
        word = "seed" if self.has_distinct_seeds else "run"
        return f"{len(self.runs)} {word}{'s' * (len(self.runs) > 1)}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs: the paths themselves, or what lies below them, each once.

    Raises:
        DataError: a path does not exist, or there is no run in it or below it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; give output folders of runs, or a folder that contains runs")
        below = []
        for folder, names, files in os.walk(path):
            names.sort()
            if METRICS in files:
                names.clear()  # its checkpoints and rollouts hold no runs
                below.append(Path(folder))
        if not below:
            raise DataError(
                f"{path}: no run in it or below it (a run's folder holds {METRICS}); give output folders of runs, e.g. "
                "output/example_gspo"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def load_run(folder: Path) -> Run:
    """Read what the comparison needs of a run.

    Raises:
        DataError: config.yaml is missing or torn.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(
            f"{folder}: no config.yaml, which tells runs that differ in their seed only from others; put it back, or "
            "give the other runs by their own folders"
        )
    record = read_run(folder, num_rollouts=0)
    try:
        config = yaml.safe_load(record.config)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}); put the run's own back") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a run's configuration; put the run's own back")
    return Run(folder, config, record)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first run was given."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(identity(run.config), []).append(run)
    names = labels([group[0].config for group in members.values()])
    return [
        Group(label, tuple(sorted(group, key=lambda run: (len(run.seed), run.seed))))
        for label, group in zip(names, members.values(), strict=True)
    ]
