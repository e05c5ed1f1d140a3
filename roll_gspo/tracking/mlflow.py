"""MLflow: a run on a tracking server, or in a SQLite database in the run's folder."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus

from roll_gspo.config.flatten import flatten
from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import SAMPLE_COLUMNS, Sample

logger = logging.getLogger(__name__)

MAX_PARAMS = 100  # limits of MLflow's REST API: per request, and per value
MAX_METRICS = 1000
MAX_PARAM_LENGTH = 6000


class MlflowTracker(Tracker):
    """Log to an MLflow run.

    MLflow keeps every value of a step. A resumed run repeats steps after its checkpoint with the same values.

    Args:
        run: the run.
        tracking_uri: default: `MLFLOW_TRACKING_URI`, else `mlflow/mlflow.db` in the run's folder.
        experiment: default: the experiment's name.
        name: default: the run's name.
    """

    def __init__(
        self, run: RunInfo, *, tracking_uri: str | None = None, experiment: str | None = None, name: str | None = None
    ) -> None:
        for name_ in ("alembic", "mlflow.store.db"):  # both log every migration of a new database
            logging.getLogger(name_).setLevel(logging.WARNING)
        folder = run.folder.resolve() / "mlflow"
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            folder.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        else:
            artifacts = None
        self._client = MlflowClient(tracking_uri=uri)
        self._finished = False
        if run.run_id is None:
            self._id = self._create(run, experiment or run.experiment, name or run.name, artifacts)
        else:
            self._id = run.run_id
            self._client.update_run(self._id, status=RunStatus.to_string(RunStatus.RUNNING))
        self.run_id = self._id
        logger.info("mlflow: run %s in %s", self._id, uri)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(legal_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(entries), MAX_METRICS):
            self._client.log_batch(self._id, metrics=entries[start : start + MAX_METRICS])

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = {"columns": list(SAMPLE_COLUMNS), "data": [list(sample.values) for sample in samples]}
        self._client.log_dict(self._id, table, f"samples/step_{step:06d}.json")

    def finish(self, report: Path | None) -> None:
        if report is not None:
            self._client.log_artifact(self._id, str(report))
        self._finished = True

    def close(self) -> None:
        status = RunStatus.FINISHED if self._finished else RunStatus.FAILED
        self._client.set_terminated(self._id, RunStatus.to_string(status))

    def _create(self, run: RunInfo, experiment: str, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment, artifacts)
        created = self._client.create_run(experiment_id, run_name=name, tags=dict.fromkeys(run.tags, "true"))
        run_id = created.info.run_id
        self._client.log_dict(run_id, dict(run.config), "config.json")
        params = [Param(legal_name(key), str(value)[:MAX_PARAM_LENGTH]) for key, value in flatten(run.config)]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        return run_id


def legal_name(name: str) -> str:
    """Return a metric or parameter name with only the characters that MLflow accepts (`avg@32` -> `avg_at_32`)."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))
