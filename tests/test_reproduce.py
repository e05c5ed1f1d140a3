"""examples/reproduce_gspo: every run is a valid configuration, and the tables contain the logged values."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from composed import load_config

from roll_gspo.pipelines.plan import make_plan
from roll_gspo.tracking.jsonl import JsonlTracker
from roll_gspo.tracking.names import METRICS

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce_gspo" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_every_setting_is_a_valid_run(reproduce: ModuleType) -> None:
    for settings, columns in reproduce.STUDIES.values():
        assert {column.metric for column in columns} <= set(METRICS)
        for setting in settings:
            config = load_config("example_gspo_paper", *reproduce.COMMON[2:], *setting.overrides).config
            plan = make_plan(config)
            assert plan.not_runnable == () and plan.warnings == ()
            assert config.updates_per_rollout == (16 if "16 mini-batches" in setting.name else 4)


def test_settings_of_a_study_differ_only_in_the_compared_keys(reproduce: ModuleType) -> None:
    settings, _ = reproduce.STUDIES["stability"]
    pairs = zip(settings[::2], settings[1::2], strict=True)
    for gspo, grpo in pairs:
        one, other = (
            load_config("example_gspo_paper", *reproduce.COMMON[2:], *s.overrides).config.model_dump()
            for s in (gspo, grpo)
        )
        assert {key for key in one if one[key] != other[key]} == {"importance_sampling", "pg_clip_low", "pg_clip_high"}


def test_folders_of_settings_are_distinct(reproduce: ModuleType) -> None:
    folders = [setting.folder for settings, _ in reproduce.STUDIES.values() for setting in settings]
    assert len(set(folders)) == len(folders)


def test_table_has_the_mean_and_every_seed(reproduce: ModuleType, tmp_path: Path) -> None:
    settings, columns = reproduce.STUDIES["stability"]
    for seed in reproduce.SEEDS:
        folder = reproduce.run_folder(settings[0], tmp_path, seed)
        folder.mkdir(parents=True)
        tracker = JsonlTracker(folder / "metrics.jsonl")
        for step in range(1, 11):
            reward = 0.1 * seed + (0.5 if step <= 5 else 0.2)
            tracker.log(step, {"rollout/score_mean": reward, "actor/clip_fraction": 0.25})
        tracker.close()
    first, second = reproduce.table(settings[:2], columns, tmp_path).splitlines()[2:]
    cells = dict(zip([column.title for column in columns], first.strip("| ").split(" | ")[1:], strict=True))
    assert cells["reward, best 5"] == "**0.600** (0.500 0.600 0.700)"
    assert cells["reward, last 5"] == "**0.300** (0.200 0.300 0.400)"
    assert cells["clipped tokens"] == "**0.2500** (0.2500 0.2500 0.2500)"
    assert cells["held out"] == "–"
    assert second.endswith("– |"), "nothing was run"
    assert reproduce.last_step(reproduce.run_folder(settings[0], tmp_path, 0)) == 10


def test_collapse_is_measured_after_the_best_steps(reproduce: ModuleType) -> None:
    success = [0.0, 0.0, 1.0, 1.0, 0.5, 0.25, 0.75]
    assert reproduce.best(success, window=2) == 1.0
    assert reproduce.worst_after_best(success, window=2) == 0.375
    assert reproduce.worst_after_best([0.0, 0.5, 1.0], window=2) == 0.75, "the best is the end"
