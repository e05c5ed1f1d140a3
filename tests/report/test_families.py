from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from roll_gspo.report.curve_sections import staleness_histogram
from roll_gspo.report.families import family_charts
from roll_gspo.report.page import write_report
from roll_gspo.report.run_folder import RunFolder, read_run


def run_with(folder: Path, *names: str) -> RunFolder:
    rows = [{"step": step, **{name: step + i / 10 for i, name in enumerate(names)}} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def drawn(run: RunFolder) -> dict[str, list[str]]:
    """Return the labels of the lines by title of the chart."""
    return {chart.title: [series.label for series in chart.series] for chart in family_charts(run)}


def test_family_is_one_chart_with_a_line_per_metric(tmp_path: Path) -> None:
    metrics = ("score_mean", "failed", "response_length_mean", "num_samples")
    domains = [f"domain/{domain}/{metric}" for domain in ("maths", "code") for metric in metrics]
    assert drawn(run_with(tmp_path, *domains, "reward/component/format", "reward/component/correct")) == {
        "Score by domain": ["code", "maths"],
        "Reward components": ["correct", "format"],
        "Response length by domain": ["code", "maths"],
        "Samples by domain": ["code", "maths"],
        "Failed rewards by domain": ["code", "maths"],
    }


def test_validation_has_a_chart_per_metric_and_labels_k_if_it_differs(tmp_path: Path) -> None:
    names = ["avg@8", "pass@1", "pass@8", "pass@16", "maj@8"]
    run = run_with(tmp_path, *(f"validation/{g}/{n}" for g in ("aime/24", "math500") for n in names))
    assert drawn(run) == {
        "Validation: avg@k": ["aime/24", "math500"],
        "Validation: pass@k": [f"{g} @{k}" for g in ("aime/24", "math500") for k in (1, 8, 16)],
        "Validation: maj@k": ["aime/24", "math500"],
    }


def test_metrics_by_lag_share_charts_in_the_order_of_the_lags(tmp_path: Path) -> None:
    run = run_with(
        tmp_path, *(f"staleness/share_{n}" for n in (0, 10, 2)), "staleness/kl_lag_3_4", "staleness/kl_lag_1"
    )
    assert drawn(run) == {"Tokens by lag": ["0", "2", "10"], "KL by lag": ["1", "3_4"]}


def test_staleness_histogram_averages_each_lag_over_the_steps(tmp_path: Path) -> None:
    rows = [{"step": s, "staleness/mean": 0.5, "staleness/share_0": s / 4, "staleness/share_1": 0.5} for s in (1, 3)]
    rows[1] |= {"staleness/share_2": 0.5}  # a lag that one step has counts 0 in the other
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bars,) = staleness_histogram(read_run(tmp_path)).series
    assert list(bars.points) == [(0, 0.5), (1, 0.5), (2, 0.25)]
    assert staleness_histogram(run_with(tmp_path, "actor/lr")).drawable is None


def test_single_domain_has_no_chart(tmp_path: Path) -> None:
    run = run_with(tmp_path, "domain/maths/score_mean", "validation/math500/avg@4")
    assert drawn(run) == {"Validation: avg@k": ["math500"]}


def test_more_lines_than_colors_take_several_charts(tmp_path: Path) -> None:
    found = drawn(run_with(tmp_path, *(f"domain/d{i:02}/score_mean" for i in range(19))))
    assert {title: len(lines) for title, lines in found.items()} == {
        "Score by domain (1)": 7,
        "Score by domain (2)": 7,
        "Score by domain (3)": 5,
    }


def test_page_draws_families_once(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run_with(tmp_path, f"domain/{evil}/score_mean", "domain/code/score_mean", "domain/code/odd", "reward/score_mean")
    parser = HTMLParser()
    texts: list[str] = []
    parser.handle_data = lambda data: texts.append(data)  # type: ignore[method-assign]
    parser.feed(write_report(tmp_path).read_text())
    assert "Score by domain" in texts and evil in "".join(texts)
    assert "domain/code/odd" in texts and "domain/code/score_mean" not in texts
