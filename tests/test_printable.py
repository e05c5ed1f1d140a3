"""Text from data, models and rewards in console, log and samples of trackers."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from pathlib import Path

import pytest

from roll_gspo.data.__main__ import main as check
from roll_gspo.printable import printable, printable_line
from roll_gspo.tracking.base import RunInfo
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.jsonl import read_metrics
from roll_gspo.tracking.samples import Sample
from roll_gspo.tracking.trackers import build_trackers

EVIL = "a\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m \u202eevil\u2066 \ud83d \u2028 \ufeff\U000e0041z"
SAFE = r"a\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m \u202eevil\u2066 \ud83d \u2028 \ufeff\U000e0041z"  # as `ascii` writes it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain [markup] $\\frac{1}{2}$ <b>", "plain [markup] $\\frac{1}{2}$ <b>"),
        ("مرحبا 数学 👩‍👩‍👧 é \ufffd می‌خواهم", "مرحبا 数学 👩‍👩‍👧 é \ufffd می‌خواهم"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        (EVIL, SAFE),
        ("\\x1b", "\\x1b"),
    ],
)
def test_printable_escapes_what_controls_a_terminal_and_nothing_else(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected


def test_printable_line_is_one_line() -> None:
    assert printable_line("row\n2026-01-01 00:00:00,000 ERROR\tx") == r"row\n2026-01-01 00:00:00,000 ERROR\tx"


def test_printable_text_has_no_control_characters_and_can_be_encoded() -> None:
    every = "".join(map(chr, range(0x110000)))
    left = printable(every)
    left.encode("utf-8")
    assert {c for c in left if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} == {"\t", "\n"}
    assert not {c for c in left if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "FSI")}


def test_console_and_run_log_show_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest-xdist cannot send a log with lone surrogates from its worker.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with Console("run", 1, tmp_path, stream=stream) as console, console.stage(f"rewards {EVIL}"):
        console.warning(f"reward failed: {EVIL}")
    stream.seek(0)
    for text in (stream.read(), (tmp_path / "run.log").read_text(encoding="utf-8")):
        assert f"reward failed: {SAFE}\n" in text and f"rewards {SAFE}: " in text
        assert printable(text) == text


def test_metrics_are_logged_under_printable_names(tmp_path: Path) -> None:
    run = RunInfo(folder=tmp_path, name="run", experiment="exp")
    trackers = build_trackers(["tensorboard", "stdout"], run)
    trackers.log(1, {f"validation/{EVIL}\n/avg@1": 0.5})
    trackers.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, f"validation/{SAFE}\\n/avg@1": 0.5}]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert SAFE.encode() in events


def test_data_check_prints_any_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": EVIL, "prompt": EVIL, "ground_truth": EVIL, "tag": EVIL, "domain": EVIL, EVIL: 1}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({'id': EVIL})}\n")
    check(["check", str(tmp_path / "rows.jsonl")])
    captured = capsys.readouterr()
    assert SAFE in captured.out and printable(captured.out + captured.err) == captured.out + captured.err


def test_samples_of_trackers_are_printable() -> None:
    sample = Sample(1.0, 0.5, 1, "stop", EVIL, EVIL, EVIL, EVIL, EVIL)
    assert sample.values[-5:] == (SAFE,) * 5
