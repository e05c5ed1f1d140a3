"""Weights & Biases: a run on its servers, or an offline run in the run's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import SAMPLE_COLUMNS, Sample

logger = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """Log to a wandb run.

    W&B drops metrics of steps that its run has already. A resumed run repeats those steps with the same values.

    Args:
        run: the run.
        project: default: the experiment's name.
        entity: user or team; default: that of the account.
        name: default: the run's name.
        group, job_type, notes: as in `wandb.init`.
        mode: `online`, `offline`, `shared` or `disabled`; default: `WANDB_MODE`, else `online` if an API key is set.
        log_dir: folder in which `wandb/` is created; default: the run's folder.
        settings: fields of `wandb.Settings`.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        mode: Any = None,
        log_dir: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        quiet = {"console": "off", "silent": True, **(settings or {})}  # the console has its own view of the run
        chosen: Any = mode or default_mode()
        self._run = wandb.init(
            project=project or run.experiment,
            entity=entity,
            name=name or run.name,
            group=group,
            job_type=job_type,
            notes=notes,
            mode=chosen,
            dir=log_dir or run.folder,
            id=run.run_id,
            resume="allow" if run.run_id else None,
            tags=list(run.tags),
            config=dict(run.config),
            reinit="create_new",
            settings=wandb.Settings(**quiet),
        )
        self.run_id = self._run.id
        self._finished = False
        folder = Path(self._run.dir).parent
        logger.info("wandb: %s", f"upload with wandb sync {folder}" if self._run.offline else self._run.url)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[list(sample.values) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def finish(self, report: Path | None) -> None:
        self._finished = True
        if report is not None:
            artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(str(report))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._finished else 1)


def default_mode() -> str:
    """Return `WANDB_MODE`, else `online` if the environment or a netrc file holds an API key, else `offline`."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


def _has_netrc_entry() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    paths = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in paths:
        try:
            if netrc(path).authenticators(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False
