from __future__ import annotations

import math
from pathlib import Path

import pytest
from compared_runs import all_metrics, write_run, write_sweep

from roll_gspo.compare.caveats import find_caveats
from roll_gspo.compare.runs import find_runs, group_runs, load_run
from roll_gspo.compare.summary import SUMMARY_METRICS, format_mean, summary_columns
from roll_gspo.tracking.names import METRICS


def test_final_values_reduce_last_steps_last_validation_and_whole_run(tmp_path: Path) -> None:
    write_sweep(tmp_path)  # three seeds, shifted by 0, 0.02 and 0.04
    groups = group_runs([load_run(folder) for folder in find_runs([tmp_path])])
    table = {column.metric.title: column for column in summary_columns(groups)}
    assert table["Training reward"].run_text(0, 0) == "0.380"  # steps 16 to 20: 0.2 + 0.01 * 18
    assert table["Training reward"].group_text(0) == "0.400 ± 0.020"
    assert table["Held-out accuracy"].group_text(1) == "0.520 ± 0.020"
    assert table["Tokens (thousands)"].run_text(1, 2) == "20.0"
    assert table["Time (minutes)"].values[0][0] == pytest.approx(20 * 2 / 60)


def test_final_values_of_one_run_have_no_deviation_and_missing_metrics_no_column(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "a", row=lambda step: {"rollout/score_mean": 0.5})),
        load_run(write_run(tmp_path / "b", "algorithm=grpo", row=all_metrics)),
    ]
    table = {column.metric.title: column for column in summary_columns(group_runs(runs))}
    assert table["Training reward"].group_text(0) == "0.500"
    assert (table["Entropy (nats)"].group_text(0), table["Entropy (nats)"].group_text(1)) == ("—", "0.500")
    only_scores = summary_columns(group_runs(runs[:1]))
    assert [column.metric.title for column in only_scores] == ["Training reward"]


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        (0.72148, 0.0304, "0.721 ± 0.030"),
        (27.796, 0.1791, "27.80 ± 0.18"),
        (561540.0, 801.0, "561,540 ± 801"),
        (2.4e-4, 3e-5, "(2.40 ± 0.30)e-4"),
        (0.5, 0.0, "0.500 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (0.5, 1e-12, "0.50000 ± 0.00000"),
    ],
)
def test_mean_and_deviation_have_the_same_decimals(mean: float, deviation: float, expected: str) -> None:
    assert format_mean(mean, deviation) == expected


def test_summary_metrics_are_known() -> None:
    assert {name for metric in SUMMARY_METRICS for name in metric.metrics} <= set(METRICS)


def test_clean_runs_have_no_caveats(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    assert find_caveats(group_runs([load_run(folder) for folder in find_runs([tmp_path])]), []) == []


def test_caveats_name_runs_that_are_short_broken_or_single(tmp_path: Path) -> None:
    def broken(step: int) -> dict[str, float]:
        return all_metrics(step) | {"actor/skipped_updates": 1.0, "actor/grad_norm": math.inf}

    runs = [
        load_run(write_run(tmp_path / "short", seed=0, steps=14)),
        load_run(write_run(tmp_path / "twice", seed=1)),
        load_run(write_run(tmp_path / "again", seed=1, row=broken)),
        load_run(write_run(tmp_path / "lone", "algorithm=grpo", seed=5, row=lambda step: {"time/step": 1.0})),
    ]
    empty = load_run(write_run(tmp_path / "empty", seed=3, steps=0, row=lambda step: {}))
    caveats = find_caveats(group_runs(runs), [empty])
    for parts in (
        ("empty",),
        ("seed 0", "step 14 of 20"),
        ("seed 0", "validation", "step 10"),
        ("more than one run", "seed 1"),
        ("seed 1", "20 optimizer", "skipped"),
        ("actor/grad_norm at 20 steps",),
        ("seed 5: no validation",),
        ("metrics.jsonl",),
        ("seeds differ", "0, 1, 1"),
        ("one run only",),
    ):
        assert sum(all(part in caveat for part in parts) for caveat in caveats) == 1, parts
