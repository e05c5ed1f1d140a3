from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from roll_gspo.errors import ConfigError
from roll_gspo.tracking.base import TRACKERS, Trackers, build_trackers
from roll_gspo.tracking.jsonl import JsonlTracker, read_metrics


def test_trackers_all_load_and_jsonl_is_always_on(tmp_path: Path) -> None:
    for name in TRACKERS:
        trackers = build_trackers([name], tmp_path / name)
        trackers.log(1, {"reward/score_mean": 0.5})
        trackers.close()
        assert read_metrics(tmp_path / name / "metrics.jsonl") == [{"step": 1, "reward/score_mean": 0.5}]


def test_trackers_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="track_with: unknown name 'tensorbord'; did you mean 'tensorboard'"):
        build_trackers(["tensorbord"], tmp_path)


def test_trackers_unknown_keyword_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracker_kwargs: .*logdir.*track_with: tensorboard"):
        build_trackers(["tensorboard"], tmp_path, tracker_kwargs={"logdir": "x"})


def test_trackers_broken_extra_does_not_stop_the_run(tmp_path: Path, caplog) -> None:
    class Broken:
        calls = 0

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            self.calls += 1
            raise OSError("disk full")

        def close(self) -> None:
            pass

    broken = Broken()
    trackers = Trackers(JsonlTracker(tmp_path / "metrics.jsonl"), [broken])
    trackers.log(1, {"a": 1.0})
    trackers.log(2, {"a": 2.0})
    trackers.close()
    assert broken.calls == 1
    assert "disk full" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_stdout_prints_a_line_a_family(tmp_path: Path, capsys) -> None:
    trackers = build_trackers(["stdout"], tmp_path)
    trackers.log(7, {"actor/lr": 1e-6, "actor/grad_norm": 2.0, "time/step": 3.25})
    trackers.close()
    assert capsys.readouterr().out == "[step 7] actor: lr=1e-06 grad_norm=2\n[step 7] time: step=3.25\n"


def test_tensorboard_reads_back_and_resume_hides_what_is_redone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, offset in ((1, 5, 0.0), (4, 6, 100.0)):
        trackers = build_trackers(["tensorboard"], tmp_path, first)
        for step in range(first, last + 1):
            trackers.log(step, {"reward/score_mean": offset + step, "bad": math.nan})
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("reward/score_mean")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]


def test_tracking_and_report_do_not_import_torch() -> None:
    code = (
        "import sys, roll_gspo.tracking.base, roll_gspo.tracking.console, roll_gspo.tracking.rollouts, "
        "roll_gspo.tracking.tensorboard, roll_gspo.tracking.stdout, roll_gspo.tracking.names, "
        "roll_gspo.tracking.memory, roll_gspo.report.page; "
        "sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
