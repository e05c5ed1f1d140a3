from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

from roll_gspo.tracking.jsonl import JsonlTracker, read_metrics


def strict(text: str) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write(path: Path, first_step: int, last_step: int, factor: float = 1.0) -> None:
    tracker = JsonlTracker(path, first_step)
    for step in range(first_step, last_step + 1):
        tracker.log(step, {"reward/score_mean": factor * step})
    tracker.close()


def test_jsonl_writes_one_flat_object_a_step(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 3)
    rows = strict((tmp_path / "metrics.jsonl").read_text())
    assert rows == [{"step": s, "reward/score_mean": float(s)} for s in (1, 2, 3)]


def test_jsonl_line_is_on_disk_before_close(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"a": 1.0})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == [{"step": 1, "a": 1.0}]
    tracker.close()


def test_jsonl_nonfinite_is_null_and_warned_about(tmp_path: Path, caplog) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"a": math.nan, "b": -math.inf, "c": 1.5})
    tracker.close()
    assert strict((tmp_path / "metrics.jsonl").read_text()) == [{"step": 1, "a": None, "b": None, "c": 1.5}]
    assert "a = nan, b = -inf" in caplog.text


def test_jsonl_resume_gives_the_file_of_an_unbroken_run(tmp_path: Path) -> None:
    write(tmp_path / "unbroken.jsonl", 1, 8)
    write(tmp_path / "resumed.jsonl", 1, 6)
    write(tmp_path / "resumed.jsonl", 4, 8)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_jsonl_torn_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        write(path, 3, 3)
        assert path.read_bytes() == whole


def test_jsonl_binary_rubbish_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1.0}\n\x00\x00\xff\xfe\n[1]\n{"a": 2}\n')
    assert read_metrics(path) == [{"step": 1, "a": 1.0}]
    JsonlTracker(path, 2).close()
    assert path.read_bytes() == b'{"step": 1, "a": 1.0}\n'


def _log_forever(path: Path) -> None:
    tracker = JsonlTracker(path)
    step = 0
    while True:
        step += 1
        tracker.log(step, {f"metric/{i}": 0.1 * step for i in range(60)})


def test_jsonl_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = multiprocessing.get_context("fork").Process(target=_log_forever, args=(path,))
    writer.start()
    assert writer.pid
    while len(read_metrics(path)) < 20:
        assert writer.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    write(path, 11, 12)
    assert [row["step"] for row in strict(path.read_text())] == list(range(1, 13))
