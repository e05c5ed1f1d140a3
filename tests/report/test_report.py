from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from roll_gspo.errors import DataError
from roll_gspo.report.page import CHARTS, write_report
from roll_gspo.report.run_folder import MAX_WARNINGS, read_run
from roll_gspo.tracking.names import METRICS
from roll_gspo.tracking.rollouts import RolloutRecord, RolloutWriter

EVIL = "<script>alert('&')</script>\"><img src=x onerror=alert(1)> </pre>"
VOID = {"meta", "img", "br", "link", "path", "circle", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"


def metrics_of(step: int) -> dict[str, float | None]:
    wave = math.sin(step)
    row: dict[str, float | None] = {name: 0.5 + 0.1 * wave for name in METRICS if not name.startswith("time/")}
    stages = {"time/generate": 2.0 + 0.1 * wave, "time/update": 1.0, "time/other": 0.25}
    clean: dict[str, float | None] = {"actor/skipped_updates": 0.0, "reward/failed": 0.0}
    return {**row, **stages, "time/step": sum(stages.values()), **clean}


def write_run(folder: Path, num_steps: int, **changes: float | None) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps({"step": step, **metrics_of(step), **changes}) + "\n")


def write_rollouts(folder: Path, steps: range, text: str = "1+1=2", samples: int = 8) -> None:
    writer = RolloutWriter(folder / "rollouts")
    for step in steps:
        records = [
            RolloutRecord(
                prompt=f"prompt {text}",
                response=f"response {i} {text}",
                score=float(i % 2),
                failed=False,
                advantage=i % 2 - 0.5,
                ground_truth=text,
                domain=text,
                group=i // 4,
                finish_reason="stop",
                prompt_token_ids=(1,),
                response_token_ids=(2, 3),
                weights_version=step - 1,
                failure=text,
                answer=text,
                components={text: 1.0},
                response_tokens=(f"response {i} ", text),
                rollout_log_probs=(-0.5, -0.25),
                old_log_probs=(-0.5, -0.25),
                advantages=(0.5, 0.5),
            )
            for i in range(samples)
        ]
        writer.write(step, records)


def test_report_has_every_section_and_figures_from_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 20)
    write_rollouts(tmp_path, range(1, 21))
    (tmp_path / "config.yaml").write_text("exp_name: my_run\nseed: 42\n")
    (tmp_path / "plan.txt").write_text("16 samples -> 4 mini-batches")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    for text in ("my_run", "Reward", "Clip fraction", "Importance ratio", "Where the time goes", "Rollouts"):
        assert text in page.text
    rewards = [metrics_of(s)["reward/score_mean"] or 0.0 for s in range(1, 21)]
    assert f"{sum(rewards[:5]) / 5:.4g}" in page.text
    assert f"{sum(rewards[-5:]) / 5:.4g}" in page.text
    assert "seed: 42" in page.text and "16 samples -> 4 mini-batches" in page.text
    assert [f"Step {s}\n" in page.text for s in (1, 2, 7, 14, 20)] == [True, False, True, True, True]
    assert "Attention" not in page.text


def test_report_drawings_are_well_formed_and_inside_their_frame(tmp_path: Path) -> None:
    write_run(tmp_path, 30)
    source = write_report(tmp_path).read_text()
    drawings = [part.split("</svg>")[0] + "</svg>" for part in source.split("<svg")[1:]]
    assert len(drawings) > len(CHARTS)
    for drawing in drawings:
        root = ElementTree.fromstring("<svg" + drawing)
        width = float(root.attrib["viewBox"].split()[2])
        for series in json.loads(root.attrib["data-readings"]):
            steps = [point[0] for point in series["p"]]
            assert steps == sorted(steps)
            assert all(50 <= point[1] <= width and -10 <= point[2] <= 200 for point in series["p"])


def test_report_needs_no_network(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    page = Page(write_report(tmp_path).read_text())
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img")
        assert not {"src", "href"} & set(attributes)
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy and "default-src 'none'" in (policy[0] or "")


def test_report_escapes_everything_from_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 2, **{EVIL: 1.0, f"time/{EVIL}": 9.0})
    write_rollouts(tmp_path, range(1, 3), EVIL)
    (tmp_path / "config.yaml").write_text(f"exp_name: {EVIL}\n")
    (tmp_path / "plan.txt").write_text(EVIL)
    (tmp_path / "run.log").write_text(f"2026-01-01 00:00:00,000 WARNING a: {EVIL}\n")
    page = Page(write_report(tmp_path).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.text.count(EVIL) > 10


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_report_of_a_young_run(tmp_path: Path, num_steps: int) -> None:
    write_run(tmp_path, num_steps)
    page = Page(write_report(tmp_path).read_text())
    expected = {0: "no step yet", 1: "1 step", 2: "steps 1 to 2"}[num_steps]
    assert expected in page.text


def test_report_passes_over_torn_lines(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    write_rollouts(tmp_path, range(1, 2))
    for path in (tmp_path / "metrics.jsonl", tmp_path / "rollouts" / "step_000001.jsonl"):
        path.write_bytes(path.read_bytes() + b'{"step": 4, "reward/sco')
    run = read_run(tmp_path)
    assert run.steps == [1, 2, 3]
    assert len(run.rollouts[0].samples) == 8
    write_report(tmp_path)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e12, None])
def test_report_draws_constant_and_missing_figures(tmp_path: Path, value: float | None) -> None:
    write_run(tmp_path, 12, **dict.fromkeys(METRICS, value))
    source = write_report(tmp_path).read_text()
    Page(source)
    assert "nan" not in source.split("<body>")[1].split("<script>")[0].lower()


def test_report_calls_attention_to_what_went_wrong(tmp_path: Path) -> None:
    write_run(tmp_path, 5, **{"actor/skipped_updates": 1.0, "reward/failed": 3.0, "actor/grad_norm": None})
    noise = "2026-01-01 00:00:00,000 INFO roll_gspo: all is well\n"
    log = "".join(f"2026-01-01 00:00:00,000 WARNING roll_gspo: no {i}\n{noise}" for i in range(100))
    (tmp_path / "run.log").write_text(log)
    page = Page(write_report(tmp_path).read_text())
    assert "Optimizer steps skipped: 5 (step 1, 2, 3, 4, 5)" in page.text
    assert "Rewards that could not be computed: 15 (step" in page.text
    assert "actor/grad_norm was not finite: step 1, 2" in page.text
    assert f"({MAX_WARNINGS})" in page.text
    assert "no 99" in page.text and "all is well" not in page.text


def test_report_of_a_long_run_is_small(tmp_path: Path) -> None:
    write_run(tmp_path, 3000)
    write_rollouts(tmp_path, range(1, 3), "long " * 2000, samples=512)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3e6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "rollouts"]


def test_report_charts_name_known_metrics() -> None:
    assert {name for _, _, lines, _, _ in CHARTS for _, name, _, _ in lines} <= set(METRICS)


def test_report_without_a_run_says_what_is_missing(tmp_path: Path) -> None:
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
