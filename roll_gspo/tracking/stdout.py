"""Metrics and samples of every step as text on standard output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import Sample


class StdoutTracker(Tracker):
    """Print one line per family of metrics (`actor/`, `reward/`, ...) and step."""

    run_id = None

    def __init__(self, run: RunInfo) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        families: dict[str, list[str]] = {}
        for name, value in metrics.items():
            family, _, quantity = name.rpartition("/")
            families.setdefault(family, []).append(f"{quantity}={value:.6g}")
        lines = (f"[step {step}] {family}: {' '.join(values)}" for family, values in families.items())
        print("\n".join(lines), flush=True)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        texts = (f"[step {step}] sample {i}: {sample.text}" for i, sample in enumerate(samples, start=1))
        print("\n".join(texts), flush=True)

    def finish(self, report: Path | None) -> None:
        pass

    def close(self) -> None:
        pass
