from __future__ import annotations

import base64
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from browsed_run import record, write_samples
from parsed_page import ParsedPage

from roll_gspo.errors import DataError
from roll_gspo.report.curve_sections import CHARTS
from roll_gspo.report.page import write_report
from roll_gspo.report.run_folder import MAX_LOG_WARNINGS, read_run
from roll_gspo.report.warnings import COUNTED_PROBLEMS, run_warnings
from roll_gspo.rollout_files import step_path
from roll_gspo.tracking.names import METRICS

EVIL = "<script>alert('&')</script>\"><img src=x onerror=alert(1)> </pre>"


DRAWN = sorted({name for *_, rows, _, _ in CHARTS for _, name, _, _ in rows})


def metrics_of(step: int) -> dict[str, float | None]:
    """Return the metrics of a step: those with a chart, a few others, and no problems."""
    wave = math.sin(step)
    names = (*DRAWN, "rollout/score_mean", "rollout/num_tokens", "validation/score_mean", "actor/pg_loss")
    row: dict[str, float | None] = dict.fromkeys(names, 0.5 + 0.1 * wave)
    stages = {"time/generate": 2.0 + 0.1 * wave, "time/update": 1.0, "time/other": 0.25}
    row["actor/clip_distance"] = 3.0  # above the noise
    return {**row, **stages, "time/step": sum(stages.values()), **dict.fromkeys(COUNTED_PROBLEMS, 0.0)}


def write_run(folder: Path, num_steps: int, **changes: float | None) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps({"step": step, **metrics_of(step), **changes}) + "\n")


def write_rollouts(folder: Path, steps: range, text: str = "1+1=2", samples: int = 8) -> None:
    for step in steps:
        records = [
            record(
                (f"response {i} ", text),
                prompt=f"prompt {text}",
                score=float(i % 2),
                advantage=i % 2 - 0.5,
                ground_truth=text,
                domain=text,
                group=i // 4,
                failure=text,
                answer=text,
                components={text: 1.0},
            )
            for i in range(samples)
        ]
        write_samples(step_path(folder / "rollouts", step), records)


def test_report_has_every_section_and_values_of_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 20)
    write_rollouts(tmp_path, range(1, 21))
    (tmp_path / "config.yaml").write_text("exp_name: my_run\nseed: 42\n")
    (tmp_path / "plan.txt").write_text("16 samples -> 4 mini-batches")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = ParsedPage(path.read_text())
    for text in ("my_run", "Reward", "Clip fraction", "Importance ratio", "Stage times", "Samples"):
        assert text in page.text
    rewards = [metrics_of(s)["rollout/score_mean"] or 0.0 for s in range(1, 21)]
    assert f"{sum(rewards[:5]) / 5:.4g}" in page.text
    assert f"{sum(rewards[-5:]) / 5:.4g}" in page.text
    assert "seed: 42" in page.text and "16 samples -> 4 mini-batches" in page.text
    assert [f"Step {s}\n" in page.text for s in (1, 2, 7, 14, 20)] == [True, False, True, True, True]
    assert "Warnings" not in page.text and "Profiler traces" not in page.text


def test_every_chart_of_the_report_has_data_and_axis_titles(tmp_path: Path) -> None:
    write_run(tmp_path, 30)
    page = ParsedPage(write_report(tmp_path).read_text())
    charts = page.charts()
    assert len(charts) == len(page.descriptions()) > len(CHARTS)
    assert all(chart["x"] and chart["y"] and chart["title"] for chart in charts)
    (reward,) = [chart for chart in charts if chart["title"] == "Reward"]
    assert reward["series"][0]["y"] == pytest.approx([metrics_of(s)["rollout/score_mean"] for s in range(1, 31)])


def test_report_names_host_date_and_commit_of_the_latest_process(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    launches = [{"host": f"node{i}", "started": f"2026-01-0{i} 10:00:00", "commit": f"abc{i}"} for i in (1, 2)]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(launch) + "\n" for launch in launches))
    page = ParsedPage(write_report(tmp_path).read_text())
    assert "steps 1 to 2 · node2 · 2026-01-02 10:00:00 · abc2" in page.text
    assert "Processes of this run (2)" in page.text and "host: node1" in page.text


def test_only_the_script_of_the_page_may_run(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    source = write_report(tmp_path).read_text()
    script = source.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source and "connect-src" not in source


def test_report_needs_no_network(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    ParsedPage(write_report(tmp_path).read_text()).check_loads_nothing()


def test_report_links_profiler_traces(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    (tmp_path / "profile").mkdir()
    for name in ("step_000002.json.gz", "rank 1#.json.gz", "notes.txt"):
        (tmp_path / "profile" / name).touch()
    page = ParsedPage(write_report(tmp_path).read_text())
    page.check_loads_nothing()
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["profile/rank%201%23.json.gz", "profile/step_000002.json.gz"]


def test_report_escapes_everything_from_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 2, **{EVIL: 1.0, f"time/{EVIL}": 9.0})
    write_rollouts(tmp_path, range(1, 3), EVIL)
    (tmp_path / "config.yaml").write_text(f"exp_name: {EVIL}\n")
    (tmp_path / "plan.txt").write_text(EVIL)
    (tmp_path / "run.log").write_text(f"2026-01-01 00:00:00,000 WARNING a: {EVIL}\n")
    page = ParsedPage(write_report(tmp_path).read_text())
    assert page.names().count("script") == 1 and "img" not in page.names()
    assert page.text.count(EVIL) > 10 and EVIL in [chart["title"] for chart in page.charts()]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_report_of_a_young_run(tmp_path: Path, num_steps: int) -> None:
    write_run(tmp_path, num_steps)
    page = ParsedPage(write_report(tmp_path).read_text())
    expected = {0: "no step yet", 1: "1 step", 2: "steps 1 to 2"}[num_steps]
    assert expected in page.text


def test_report_ignores_torn_files(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    write_rollouts(tmp_path, range(1, 2))
    lines = tmp_path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"step": 4, "reward/sco')
    (tmp_path / "rollouts" / "step_000002.parquet").write_bytes(b"PAR1 torn")
    run = read_run(tmp_path)
    assert run.steps == [1, 2, 3]
    assert len(run.rollouts[0].samples) == 8
    write_report(tmp_path)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e12, None])
def test_report_draws_constant_and_missing_metrics(tmp_path: Path, value: float | None) -> None:
    write_run(tmp_path, 12, **dict.fromkeys(metrics_of(1), value))
    page = ParsedPage(write_report(tmp_path).read_text())
    assert "nan" not in page.text.lower() and "nan" not in str(page.charts()).lower()


def test_report_warns_of_skipped_updates_failed_rewards_and_values_that_are_not_finite(tmp_path: Path) -> None:
    write_run(tmp_path, 5, **{"actor/skipped_updates": 1.0, "reward/failed": 3.0, "actor/grad_norm": None})
    noise = "2026-01-01 00:00:00,000 INFO roll_gspo: all is well\n"
    log = "".join(f"2026-01-01 00:00:00,000 WARNING roll_gspo: no {i}\n{noise}" for i in range(100))
    (tmp_path / "run.log").write_text(log)
    page = ParsedPage(write_report(tmp_path).read_text())
    skipped, failed, not_finite = run_warnings(read_run(tmp_path))
    assert skipped.startswith("5 ") and failed.startswith("15 ") and not_finite.startswith("actor/grad_norm ")
    assert all("1, 2, 3, 4, 5" in warning and warning in page.text for warning in (skipped, failed, not_finite))
    assert f"({MAX_LOG_WARNINGS})" in page.text
    assert "no 99" in page.text and "all is well" not in page.text


def test_report_of_a_long_run_is_small(tmp_path: Path) -> None:
    write_run(tmp_path, 3000)
    write_rollouts(tmp_path, range(1, 3), "long " * 2000, samples=128)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3e6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "rollouts"]


def test_report_charts_name_known_metrics() -> None:
    assert {name for *_, lines, _, _ in CHARTS for _, name, _, _ in lines} <= set(METRICS)


def test_report_of_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_report_command_line(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2)
    command = [sys.executable, "-m", "roll_gspo.report"]
    good = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert (good.returncode, good.stdout.strip()) == (0, str(tmp_path / "run" / "report.html"))
    bad = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "no metrics.jsonl" in bad.stderr and "Traceback" not in bad.stderr
