from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from roll_gspo.config.trackers import TRACKERS
from roll_gspo.errors import ConfigError, MissingDependencyError
from roll_gspo.tracking.background import BackgroundTracker
from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.jsonl import JsonlTracker, read_metrics
from roll_gspo.tracking.samples import Sample, spread
from roll_gspo.tracking.trackers import Trackers, build_trackers, check_trackers

SAMPLE = Sample(1.0, 0.5, 2, "stop", None, None, "2", "1+1=", "2<eos>")


class Recorder(Tracker):
    """A tracker that keeps what it gets, shared by its instances."""

    built: ClassVar[list[Recorder]] = []

    def __init__(self, run: RunInfo, *, color: str = "none") -> None:
        self.run, self.color = run, color
        self.run_id = run.run_id or "run-1"
        self.calls: list[tuple[object, ...]] = []
        self.threads: set[int] = {threading.get_ident()}
        Recorder.built.append(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(("log", step, dict(metrics)))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.calls.append(("samples", step, list(samples)))

    def finish(self, report: Path | None) -> None:
        self.calls.append(("finish", report))

    def close(self) -> None:
        self.calls.append(("close",))


class Raising(Recorder):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        raise OSError("disk full")


class Sleeping(Recorder):
    """Blocks forever, as a library does that waits for a server."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        threading.Event().wait()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> str:
    """`track_with` of a user's own tracker, by its dotted path."""
    monkeypatch.setattr(Recorder, "built", [])
    monkeypatch.setitem(sys.modules, "user_trackers", sys.modules[__name__])
    return "user_trackers.Recorder"


def run_info(folder: Path, first_step: int = 1) -> RunInfo:
    return RunInfo(folder=folder, name="run", experiment="exp", first_step=first_step, tags=("a",), config={"seed": 1})


def trackers_of(folder: Path, *backends: BackgroundTracker, close_timeout_s: float = 5.0) -> Trackers:
    return Trackers(JsonlTracker(folder / "metrics.jsonl"), backends, close_timeout_s)


def test_user_tracker_gets_every_call_in_one_thread(tmp_path: Path, recorder: str) -> None:
    trackers = build_trackers([recorder], run_info(tmp_path / "run"), {recorder: {"color": "red"}})
    trackers.log_samples(1, [SAMPLE])
    trackers.log(1, {"reward/score_mean": 0.5})
    trackers.finish(tmp_path / "report.html")
    trackers.close()
    (tracker,) = Recorder.built
    assert tracker.calls == [
        ("samples", 1, [SAMPLE]),
        ("log", 1, {"reward/score_mean": 0.5}),
        ("finish", tmp_path / "report.html"),
        ("close",),
    ]
    assert (tracker.run, tracker.color) == (run_info(tmp_path / "run"), "red")
    assert len(tracker.threads) == 1 and threading.get_ident() not in tracker.threads
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "reward/score_mean": 0.5}]


def test_failed_run_is_closed_without_finish(tmp_path: Path, recorder: str) -> None:
    trackers = build_trackers([recorder], run_info(tmp_path))
    trackers.log(1, {})
    trackers.close()
    assert Recorder.built[0].calls == [("log", 1, {}), ("close",)]


def test_resumed_run_gets_the_run_id_of_its_first_process(tmp_path: Path, recorder: str) -> None:
    build_trackers([recorder, "stdout"], run_info(tmp_path)).close()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {recorder: "run-1"}
    build_trackers([recorder], run_info(tmp_path, 3)).close()
    assert [tracker.run.run_id for tracker in Recorder.built] == [None, "run-1"]


def test_no_tracker_leaves_metrics_jsonl(tmp_path: Path) -> None:
    trackers = build_trackers([], run_info(tmp_path))
    trackers.log(1, {"a": 1.0})
    trackers.finish(None)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_raising_tracker_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raising = Raising(run_info(tmp_path))
    trackers = trackers_of(tmp_path, BackgroundTracker("raising", lambda: raising))
    for step in (1, 2, 3):
        trackers.log(step, {"a": 1.0})
    trackers.finish(None)
    assert raising.calls == [("log", 1, {"a": 1.0}), ("close",)]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "raising" in caplog.text and "step 1" in caplog.text and "disk full" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_tracker_that_cannot_start_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def start() -> Recorder:
        raise ConnectionError("no server")

    trackers = trackers_of(tmp_path, BackgroundTracker("remote", start))
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert len(caplog.records) == 1 and "no server" in caplog.text


def test_sleeping_tracker_is_dropped_once_its_queue_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sleeping = Sleeping(run_info(tmp_path))
    trackers = trackers_of(tmp_path, BackgroundTracker("sleeping", lambda: sleeping, max_pending=4))
    started = time.monotonic()
    for step in range(1, 20):
        trackers.log(step, {"a": 1.0})
    trackers.finish(None)
    assert time.monotonic() - started < 2
    assert len(caplog.records) == 1 and "4" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 19


def test_sleeping_tracker_delays_the_end_by_its_timeout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = [BackgroundTracker(f"sleeping {i}", lambda: Sleeping(run_info(tmp_path))) for i in range(3)]
    trackers = trackers_of(tmp_path, *others, close_timeout_s=0.3)
    trackers.log(1, {"a": 1.0})
    started = time.monotonic()
    trackers.finish(None)
    trackers.close()
    assert 0.3 <= time.monotonic() - started < 2
    assert len(caplog.records) == 3


def test_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tensorboard'"):
        build_trackers(["tensorbord"], run_info(tmp_path))


def test_unknown_option_names_the_known_ones(recorder: str) -> None:
    with pytest.raises(ConfigError, match=r"tracker_kwargs\.tensorboard\.logdir: .*log_dir"):
        check_trackers(["tensorboard"], {"tensorboard": {"logdir": "x"}})
    with pytest.raises(ConfigError, match=rf"tracker_kwargs\.{recorder}\.colour: .*color"):
        check_trackers([recorder], {recorder: {"colour": "x"}})


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "roll_gspo.tracking.wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without("wandb"), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"pip install 'roll-gspo\[wandb\]'"):
        check_trackers(["wandb"], {})


class Without:
    """An import hook that hides a package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self._package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_stdout_prints_a_line_per_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = build_trackers(["stdout"], run_info(tmp_path))
    trackers.log(7, {"actor/lr": 1e-6, "actor/grad_norm": 2.0, "time/step": 3.25})
    trackers.log_samples(8, [SAMPLE])
    trackers.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[step 7] actor: lr=1e-06 grad_norm=2", "[step 7] time: step=3.25"]
    assert lines[2].startswith("[step 8] sample 1: score 1") and lines[-1] == "response: 2<eos>"


def test_samples_are_spread_from_the_lowest_score_to_the_highest() -> None:
    scores = dict(enumerate([0.5, 0.1, 0.9, 0.3, 0.7, 0.0, 1.0]))
    assert [scores[key] for key in spread(scores, 4)] == [0.0, 0.3, 0.7, 1.0]
    assert [scores[key] for key in spread(scores, 9)] == sorted(scores.values())


def test_tracking_and_report_do_not_import_torch() -> None:
    modules = [path.split(":")[0] for name, path in TRACKERS.items() if name in ("tensorboard", "stdout")]
    modules += ["trackers", "console", "rollouts", "names", "memory"]
    names = [name if "." in name else f"roll_gspo.tracking.{name}" for name in modules] + ["roll_gspo.report.page"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
