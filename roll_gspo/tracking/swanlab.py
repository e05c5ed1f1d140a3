"""SwanLab: a run on its servers, or an offline run in the run's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import swanlab

from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import Sample

logger = logging.getLogger(__name__)


class SwanlabTracker(Tracker):
    """Log to a SwanLab run.

    Offline, each process of a resumed run has a separate folder; all carry the same run id, so that
    `swanlab sync --id ID` puts them into one run. SwanLab drops metrics of steps that its run has already.

    Args:
        run: the run.
        project: default: the experiment's name.
        workspace: default: that of the account.
        experiment_name: default: the run's name.
        description: as in `swanlab.init`.
        mode: `online`, `offline`, `local` or `disabled`; default: `SWANLAB_MODE`, else `online` if an API key is set.
        logdir: default: `swanlab/` in the run's folder.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        project: str | None = None,
        workspace: str | None = None,
        experiment_name: str | None = None,
        description: str | None = None,
        mode: Any = None,
        logdir: str | None = None,
    ) -> None:
        quiet: dict[str, Any] = {"interactive": False, "terminal": {"proxy_type": "none"}}  # the console shows the run
        settings = swanlab.Settings(**quiet)
        chosen: Any = mode or os.environ.get("SWANLAB_MODE") or ("online" if settings.api_key else "offline")
        self._run = swanlab.init(
            project=project or run.experiment,
            workspace=workspace,
            name=experiment_name or run.name,
            description=description,
            mode=chosen,
            log_dir=logdir or str(run.folder / "swanlab"),
            id=run.run_id,
            resume="allow",
            tags=list(run.tags),
            config=dict(run.config),
            reinit=True,
            settings=settings,
        )
        self.run_id = self._run.id
        self._finished = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        texts = [swanlab.Text(sample.text, caption=f"score {sample.score:g}") for sample in samples]
        self._run.log({"samples": texts}, step=step)

    def finish(self, report: Path | None) -> None:
        self._finished = True
        if report is not None:
            self._run.save(str(report), base_path=str(report.parent), policy="now")

    def close(self) -> None:
        if self._finished:
            self._run.finish()
        else:
            self._run.finish(state="crashed", error="the run failed; run.log has the error")
