"""The shipped example of episodes learns its task."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import metrics_of
from forked_command import train

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1300)]


def test_success_of_the_example_rises(tmp_path: Path) -> None:
    arguments = ("--config-name", "example_agentic_gspo", "strategy=hf", "max_steps=20")
    outcome = train(*arguments, "output_dir=out", "run_name=run", folder=tmp_path, timeout_s=1200)
    assert outcome.code == 0, outcome.err
    rows = metrics_of(tmp_path / "out/example_agentic_gspo/run")
    before, after = (row["validation/score_mean"] for row in (rows[0], rows[-1]))
    assert after - before >= 0.2, (before, after)
