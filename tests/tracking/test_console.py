from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roll_gspo.tracking.console import Console
from roll_gspo.tracking.jsonl import JsonlTracker
from roll_gspo.tracking.live import RunView, duration, sparkline, step_line

METRICS = {"rollout/score_mean": 0.25, "actor/clip_fraction": 0.15, "rollout/response_length_mean": 26.4}


def test_console_without_terminal_prints_a_line_a_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console("run", 2, tmp_path, stream=stream) as console:
        with console.stage("import engines"):
            pass
        console.start_steps()
        for step in (1, 2):
            with console.stage("generate") as progress:
                progress(4, 4)
            console.step(step, {**METRICS, **console.timings()})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("import engines: 0.")
    assert lines[1].startswith("step 1/2  reward 0.2500  clip 0.1500  length 26  0.")
    assert lines[2].startswith("step 2/2  reward")
    assert lines[3].startswith("finished after")
    assert len(lines) == 4


def test_console_reports_long_stages_while_they_last(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console("run", 9, tmp_path, stream=stream, interval_s=0.1) as console:
        console.start_steps(first_step=5)
        with console.stage("generate") as progress:
            progress(34, 64)
            time.sleep(0.35)
            seen = stream.getvalue()
    reports = re.findall(r"^step 5/9  generate  34/64  0\.[1-4] s$", seen, re.MULTILINE)
    assert 2 <= len(reports) <= 3


def test_console_routes_logging_to_screen_and_run_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    root_handlers = list(logging.getLogger().handlers)
    with Console("run", 1, tmp_path, stream=stream) as console:
        console.message("plan\nsecond line")
        console.warning("reward math_rule: 2 samples failed")
        logging.getLogger("roll_gspo.somewhere").info("own info [not] markup")
        logging.getLogger("foreign.engine").info("foreign info")
        logging.getLogger("foreign.engine").warning("foreign warning")
        console.step(1, METRICS)
    shown, logged = stream.getvalue(), (tmp_path / "run.log").read_text()
    for text in ("plan\nsecond line", "own info [not] markup", "foreign warning"):
        assert shown.count(text) == 1
        assert logged.count(text) == 1
    assert "warning: reward math_rule: 2 samples failed" in shown
    assert "foreign info" not in shown
    assert shown.count("step 1/1") == logged.count("step 1/1") == 1
    assert logging.getLogger().handlers == root_handlers


def test_console_sets_stream_handlers_aside_and_gives_them_back(tmp_path: Path) -> None:
    hydra_like = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(hydra_like)
    try:
        with Console("run", 1, tmp_path, stream=io.StringIO()) as console:
            console.warning("once")
        assert hydra_like in logging.getLogger().handlers
        assert hydra_like.stream.getvalue() == ""
    finally:
        logging.getLogger().removeHandler(hydra_like)


def test_console_keeps_the_traceback_of_a_failure(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console("run", 1, tmp_path, stream=stream)
    with pytest.raises(RuntimeError, match="boom"), console, console.stage("update"):
        raise RuntimeError("boom")
    assert "RuntimeError: boom" in (tmp_path / "run.log").read_text()
    assert threading.active_count() == 1 or not any(
        t.name.endswith("(_report_long_stages)") for t in threading.enumerate()
    )


def test_console_resumed_run_knows_its_history(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        tracker.log(step, {"rollout/score_mean": step / 10, "validation/score_mean": step / 20})
    tracker.close()
    with Console("run", 9, tmp_path, stream=io.StringIO()) as console:
        console.start_steps(first_step=4)
        assert console._view.history == [0.1, 0.2, 0.3]
        assert console._view.validation == (3, 0.15)
        assert console._view.steps_done == 3


LIVE = r"""
import logging, sys, time
from pathlib import Path
from roll_gspo.tracking.console import Console
with Console("my [run]", 4, Path(sys.argv[1])) as console:
    with console.stage("start vLLM"):
        time.sleep(0.3)
    console.start_steps()
    for step in (1, 2, 3, 4):
        with console.stage("generate") as progress:
            progress(7, 64)
            time.sleep(0.3)
        if step == 2:
            logging.getLogger("roll_gspo").warning("above the panel")
            console.warning("row \x1b]0;owned\x07\x1b[2J\u202e\ud800")
            print("a bare print")
        console.step(step, {"rollout/score_mean": step / 10, **console.timings()})
"""


def _run_in_terminal(arguments: list[str]) -> str:
    """Run a program on a pseudo-terminal and return what it wrote."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(arguments, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    os.close(controller)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_console_on_a_terminal_updates_one_panel_in_place(tmp_path: Path) -> None:
    written = _run_in_terminal([sys.executable, "-c", LIVE, str(tmp_path)])
    assert "generate 7/64" in written
    assert "start vLLM, 0." in written
    assert "\x1b[1A" in written  # the cursor goes up: drawn over, not below
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert text.count("warning: above the panel\r\n") == 1
    assert text.count("a bare print\r\n") == 1
    assert r"warning: row \x1b]0;owned\x07\x1b[2J\u202e\ud800" in text
    assert "\x1b]" not in written and "\x07" not in written and "\x1b[2J" not in written
    final = text[text.rindex("╭") :]
    assert "my [run]" in final
    assert "4 of 4 done" in final
    assert "finished" in final
    assert "▁▃▆█" in final
    assert "step 4/4" in (tmp_path / "run.log").read_text()


def test_sparkline_shows_the_course() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, float("nan"), 7.0]) == "▁█"
    assert sparkline([float(i) for i in range(800)], 8) == "▁▂▃▄▅▆▇█"


def test_duration_reads_naturally() -> None:
    seconds = (0.04, 59.94, 59.96, 185.0, 3599.7, 7630.0)
    expected = ["0.0 s", "59.9 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min"]
    assert [duration(s) for s in seconds] == expected


def test_step_line_estimates_what_is_left(tmp_path: Path) -> None:
    view = RunView("run", tmp_path, 20, "rollout/score_mean", steps_done=15, durations=[99.0] + [2.0] * 10)
    assert view.eta_s == 10.0
    assert step_line(view) == "step 15/20  2.0 s  10.0 s left"
