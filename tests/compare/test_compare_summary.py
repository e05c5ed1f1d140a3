from __future__ import annotations

import math
from pathlib import Path

import pytest
from compared_runs import figures, write_run, write_sweep

from roll_gspo.compare.caveats import remarks
from roll_gspo.compare.runs import find_runs, group_runs, load_run
from roll_gspo.compare.summary import QUANTITIES, columns, number_text, with_deviation
from roll_gspo.tracking.names import METRICS


def test_final_values_are_those_of_the_last_steps_the_last_validation_and_the_whole_run(tmp_path: Path) -> None:
    write_sweep(tmp_path)  # three seeds, shifted by 0, 0.02 and 0.04
    groups = group_runs([load_run(folder) for folder in find_runs([tmp_path])])
    table = {column.quantity.title: column for column in columns(groups)}
    assert table["Training reward"].of_run(0, 0) == "0.380"  # steps 16 to 20: 0.2 + 0.01 * 18
    assert table["Training reward"].of_group(0) == "0.400 ± 0.020"
    assert table["Held-out accuracy"].of_group(1) == "0.520 ± 0.020"
    assert table["Held-out accuracy"].steps == ((20, 20, 20), (20, 20, 20))
    assert table["Tokens (thousands)"].of_run(1, 2) == "20.0"
    assert table["Time (minutes)"].values[0][0] == pytest.approx(20 * 2 / 60)


def test_final_values_of_one_run_claim_no_spread_and_leave_out_what_is_missing(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "a", row=lambda step: {"rollout/score_mean": 0.5})),
        load_run(write_run(tmp_path / "b", "algorithm=grpo", row=figures)),
    ]
    table = {column.quantity.title: column for column in columns(group_runs(runs))}
    assert table["Training reward"].of_group(0) == "0.500"
    assert (table["Entropy (nats)"].of_group(0), table["Entropy (nats)"].of_group(1)) == ("—", "0.500")
    only_scores = columns(group_runs(runs[:1]))
    assert [column.quantity.title for column in only_scores] == ["Training reward"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.71484, "0.715"), (27.849, "27.8"), (123.4, "123"), (561540.0, "561,540"), (8.68e-5, "8.68e-5")],
)
def test_number_text(value: float, expected: str) -> None:
    assert number_text(value) == expected


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
    assert with_deviation(mean, deviation) == expected


def test_quantities_name_known_metrics() -> None:
    assert {name for quantity in QUANTITIES for name in quantity.metrics} <= set(METRICS)


def test_remarks_say_nothing_where_all_went_well(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    assert remarks(group_runs([load_run(folder) for folder in find_runs([tmp_path])]), []) == []


def test_remarks_name_runs_that_are_short_broken_or_alone(tmp_path: Path) -> None:
    def broken(step: int) -> dict[str, float]:
        return figures(step) | {"actor/skipped_updates": 1.0, "actor/grad_norm": math.inf}

    runs = [
        load_run(write_run(tmp_path / "short", seed=0, steps=14)),
        load_run(write_run(tmp_path / "twice", seed=1)),
        load_run(write_run(tmp_path / "again", seed=1, row=broken)),
        load_run(write_run(tmp_path / "lone", "algorithm=grpo", seed=5, row=lambda step: {"time/step": 1.0})),
    ]
    empty = load_run(write_run(tmp_path / "empty", seed=3, steps=0, row=lambda step: {}))
    text = "\n".join(remarks(group_runs(runs), [empty]))
    for part in (
        "empty: no step has been logged",
        "seed 0: ended (or is) at step 14 of 20",
        "seed 0: the last validation is that of step 10",
        "more than one run of seed 1",
        "seed 1: 20 optimizer steps skipped",
        "actor/grad_norm at 20 steps",
        "seed 5: no validation",
        "no rewards in metrics.jsonl",
        "not run with the same seeds",
        "one run, so nothing is known about the spread",
    ):
        assert part in text
