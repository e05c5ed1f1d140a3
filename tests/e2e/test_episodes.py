"""Episodes of several turns, on Megatron and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import SIZES, metrics_of
from forked_command import train

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.slow]


def test_example_trains_on_episodes(tmp_path: Path) -> None:
    small = [size for size in SIZES if not size.startswith(("response_length", "warm_start"))]
    arguments = (*small, "max_steps=2", "warm_start.steps=60", "output_dir=out", "run_name=run")
    outcome = train("--config-name", "example_agentic_gspo", *arguments, folder=tmp_path)
    assert outcome.code == 0, outcome.out[-3000:] + outcome.err
    run = tmp_path / "out/example_agentic_gspo/run"
    for row in metrics_of(run)[1:]:
        ends = sum(value for name, value in row.items() if name.startswith("episode/end_"))
        assert ends == pytest.approx(1.0)
        assert row["episode/end_failed"] == row["reward/failed"] == 0
        assert 1 <= row["episode/turns_mean"] <= row["episode/turns_max"] <= 8
        assert 0 < row["episode/given_tokens_fraction"] < 1
        assert row["mismatch/log_prob_diff_mean"] < 1e-5
    assert metrics_of(run)[-1]["validation/num_samples"] == 16
    assert "adding_machine" in (run / "report.html").read_text()
