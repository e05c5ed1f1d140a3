"""Every tracker with its real library, offline: a run of five steps in two processes, read back from what it wrote."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_files import records
from tracker_sessions import CONFIG, SAMPLE

TESTS = Path(__file__).parents[1]
REPEATED = [1, 2, 3, 4, 3, 4, 5]  # the second process repeats the steps after its checkpoint
OFFLINE = {  # no credentials, and no way out
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


@pytest.fixture
def sessions(tmp_path: Path) -> Callable[[str], Path]:
    """Log a run with one tracker, and return the run's folder."""

    def run(name: str) -> Path:
        names = ("PATH", "PYTHONPATH", "LANG")
        environment = {key: os.environ[key] for key in names if key in os.environ} | OFFLINE
        environment |= {"HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "trackio")}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
        (tmp_path / "home").mkdir()
        folder = tmp_path / "run"
        script = TESTS / "tracker_sessions.py"
        arguments = [sys.executable, str(script), name, str(folder)]
        outcome = subprocess.run(
            arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert outcome.returncode == 0, outcome.stderr
        assert "dropped" not in outcome.stderr
        return folder

    return run


def run_id(folder: Path, name: str) -> str:
    return json.loads((folder / "trackers.json").read_text())[name]


def test_tensorboard_shows_one_run(sessions: Callable[[str], Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    events = EventAccumulator(str(sessions("tensorboard") / "tensorboard"), {TENSORS: 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/score_mean")] == [(s, s / 8) for s in range(1, 6)]
    assert all(math.isnan(event.value) for event in events.Scalars("actor/grad_norm"))
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    assert set(texts) == {"config", "tags", "samples/1", "report"}
    assert '"world_size": 2' in texts["config"][-1] and "small, cpu" in texts["tags"][-1]
    assert all(line.startswith("    ") for line in texts["samples/1"][0].splitlines())
    assert "response: 2\n    |x|<eos>" in texts["samples/1"][0]
    assert texts["report"][0].endswith("run/report.html")


def wandb_records(file: Path) -> dict[str, list[Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[Any]] = {}
    for data in records(file):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def test_wandb_is_offline_and_keeps_its_run_id(sessions: Callable[[str], Path]) -> None:
    pytest.importorskip("wandb")
    folder = sessions("wandb")
    name = run_id(folder, "wandb")
    files = sorted(folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"), key=lambda file: file.stat().st_mtime)
    first, second = map(wandb_records, files)
    for process in (first, second):
        (run,) = process["run"]
        assert (run.run_id, run.project, run.display_name) == (name, "numbers", "first")
        assert list(run.tags) == ["small", "cpu"]
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {key: config[key] for key in CONFIG} == CONFIG
    rows = [
        {item.nested_key[-1]: json.loads(item.value_json) for item in row.item}
        for row in (*first["history"], *second["history"])
    ]
    assert [row["_step"] for row in rows] == REPEATED
    assert [row["reward/score_mean"] for row in rows] == [step / 8 for step in REPEATED]
    assert (first["exit"][0].exit_code, second["exit"][0].exit_code) == (1, 0)
    assert [artifact.name for artifact in second["artifact"] if artifact.type == "report"] == [f"report-{name}"]
    tables = [
        json.loads(path.read_text())
        for path in folder.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    ]
    assert len(tables) == 3 and all(table["data"] == [list(SAMPLE.values)] for table in tables)


def test_mlflow_writes_one_run_into_a_database(sessions: Callable[[str], Path]) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    folder = sessions("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("numbers")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id(folder, "mlflow"), "first", "FINISHED")
    assert run.data.tags["small"] == run.data.tags["cpu"] == "true"
    assert run.data.params["rewards.math.world_size"] == "2"
    history = client.get_metric_history(run.info.run_id, "reward/score_mean")
    assert sorted((value.step, value.value) for value in history) == [(step, step / 8) for step in sorted(REPEATED)]
    assert run.data.metrics["validation/all/avg_at_2"] == 0.5 and math.isnan(run.data.metrics["actor/grad_norm"])
    artifacts = folder / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert json.loads((artifacts / "config.json").read_text()) == CONFIG
    assert json.loads((artifacts / "samples" / "step_000002.json").read_text())["data"] == [list(SAMPLE.values)]
    assert (artifacts / "report.html").read_text() == "<p>the report</p>"


def test_swanlab_is_offline_and_keeps_its_run_id(sessions: Callable[[str], Path]) -> None:
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    folder = sessions("swanlab")
    name = run_id(folder, "swanlab")
    rows, starts, ends, media = [], [], [], []
    for file in sorted(folder.glob(f"swanlab/run-*-{name}/run-{name}.swanlab"), key=lambda file: file.stat().st_mtime):
        for data in records(file):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("start"):
                starts.append((record.start.id, record.start.project, record.start.name, list(record.start.tags)))
            elif record.HasField("finish"):
                ends.append(record.finish.state)
            elif record.HasField("media"):
                media.append((record.media.step, record.media.value.items[0].filename))
            elif record.HasField("scalar") and record.scalar.key == "reward/score_mean":
                rows.append((record.scalar.step, record.scalar.value.number))
    assert starts == [(name, "numbers", "first", ["small", "cpu"])] * 2
    assert rows == [(step, step / 8) for step in REPEATED]
    assert len(ends) == 2 and ends[0] != ends[1]  # crashed, finished
    assert [step for step, _ in media] == [2, 4, 4]
    (text,) = folder.glob(f"swanlab/*/media/text/{media[0][1]}")
    assert text.read_text() == SAMPLE.text
    assert len(list(folder.glob("swanlab/*/files/report.html"))) == 1


def test_trackio_writes_one_run_into_its_database(sessions: Callable[[str], Path]) -> None:
    pytest.importorskip("trackio")
    folder = sessions("trackio")
    name = run_id(folder, "trackio")
    with sqlite3.connect(folder.parent / "trackio" / "numbers.db") as database:
        logged = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select run_id, config from configs").fetchall()
        reports = database.execute("select name, type from artifacts").fetchall()
    rows = [(step, json.loads(row)) for _, _, step, row in logged]
    assert {(row[0], row[1]) for row in logged} == {(name, "first")}
    scores = [(step, row["reward/score_mean"]) for step, row in rows if "reward/score_mean" in row]
    assert scores == [(step, step / 8) for step in REPEATED]
    tables = [(step, row["samples"]["_value"]) for step, row in rows if "samples" in row]
    assert [step for step, _ in tables] == [2, 4, 4] and tables[0][1][0]["response"] == SAMPLE.response
    ((config_of, config),) = configs
    assert config_of == name and json.loads(config)["rewards"] == CONFIG["rewards"]
    assert reports == [("report-first", "report")]
