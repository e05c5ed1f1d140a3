"""trackio: a local SQLite database, or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import trackio

from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import SAMPLE_COLUMNS, Sample


class TrackioTracker(Tracker):
    """Log to a trackio run.

    Without `space_id` and `server_url` it is stored below `TRACKIO_DIR`, where `trackio show` finds it (default: the
    cache of Hugging Face). trackio keeps every value of a step. A resumed run repeats steps after its checkpoint with
    the same values.

    Args:
        run: the run.
        project: default: the experiment's name.
        name: default: the run's name.
        group, space_id, bucket_id, server_url, private, auto_log_gpu, auto_log_cpu: as in `trackio.init`.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        bucket_id: str | None = None,
        server_url: str | None = None,
        private: bool | None = None,
        auto_log_gpu: bool | None = None,
        auto_log_cpu: bool = False,
    ) -> None:
        self._run = trackio.init(
            project=project or run.experiment,
            name=name or run.name,
            group=group,
            space_id=space_id,
            bucket_id=bucket_id,
            server_url=server_url,
            private=private,
            auto_log_gpu=auto_log_gpu,
            auto_log_cpu=auto_log_cpu,
            config=dict(run.config),
            resume="allow" if run.run_id else "never",
            embed=False,
        )
        self.run_id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = trackio.Table(columns=list(SAMPLE_COLUMNS), data=[list(sample.values) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def finish(self, report: Path | None) -> None:
        if report is not None:
            self._run.log_artifact(report, name=f"report-{self._run.name}", type="report")

    def close(self) -> None:
        self._run.finish()
