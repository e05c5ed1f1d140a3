"""Traces of the roles in a window of steps."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome
from config_problems import problem_of

from roll_gspo.roles.profiled import ProfiledRole, profiled
from roll_gspo.tracking.profiler import TraceTarget, record_trace

Command = Callable[..., Outcome]
NAME = re.compile(r"(?P<role>\w+)_rank(?P<rank>\d+)_step(?P<step>\d{6})_(?P<call>\d\d)_(?P<method>\w+)\.json\.gz")


def operators(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"}


def calls(run: Path) -> dict[tuple[str, int], list[str]]:
    """Methods by (role, step), in the order of the calls; every trace is readable."""
    found: dict[tuple[str, int], list[str]] = {}
    for trace in sorted((run / "profile").iterdir()):
        match = NAME.fullmatch(trace.name)
        assert match, trace.name
        assert "aten::mm" in operators(trace) or "aten::addmm" in operators(trace), trace.name
        found.setdefault((match["role"], int(match["step"])), []).append(match["method"])
    return found


def test_every_role_is_traced_in_the_window_only(command: Command, small: tuple[str, ...]) -> None:
    outcome = command(
        *("--config-name", "example_gspo", "strategy=hf", *small, "max_steps=3", "run_name=run", "tracker=none"),
        *("adv_estimator=gae", "whiten_advantages=false", "profiler.torch.steps=[2,2]"),
    )
    assert outcome.code == 0, outcome.err
    run = Path("out/example_gspo/run")
    assert calls(run) == {
        ("actor_infer", 2): ["generate"],
        ("reference", 2): ["log_probs"],
        ("critic", 2): ["values", "update"],
        ("actor_train", 2): ["score", "update", "score"],
    }
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(f'href="profile/{trace.name}"' in report for trace in (run / "profile").iterdir())


def test_supervised_training_is_traced(command: Command) -> None:
    outcome = command(
        *("--config-name", "example_sft", "strategy=hf", "output_dir=out", "max_steps=3", "run_name=run"),
        *("actor_train.data_args.num_rows=16", "validation=null", "profiler.torch.steps=[1,2]", "tracker=none"),
    )
    assert outcome.code == 0, outcome.err
    assert calls(Path("out/example_sft/run")) == {("actor_train", 1): ["update"], ("actor_train", 2): ["update"]}


@pytest.mark.parametrize("steps", ["[3,2]", "[1]", "[0,2]", "3"])
def test_wrong_window_is_refused(steps: str) -> None:
    assert problem_of(f"profiler.torch.steps={steps}").key.startswith("profiler.torch.steps")


class Doubling(ProfiledRole):
    @profiled
    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(x) + x

    @profiled
    def once(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp().log()


def test_call_inside_a_traced_call_has_no_trace(tmp_path: Path) -> None:
    role = Doubling()
    role.profile(TraceTarget(tmp_path, "doubling", 7, rank=3))
    assert role.twice(torch.ones(2)).tolist() == pytest.approx([2.0, 2.0])
    role.once(torch.ones(2))
    role.profile(None)
    role.once(torch.ones(2))
    first, last = sorted(tmp_path.iterdir())
    assert first.name == "doubling_rank3_step000007_01_twice.json.gz"
    assert last.name == "doubling_rank3_step000007_03_once.json.gz"
    assert {"aten::exp", "aten::add"} <= operators(first)


def test_trace_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file")
    with record_trace(tmp_path / "profile" / "trace.json.gz"):
        torch.ones(2)
    assert len(caplog.records) == 1 and "trace.json.gz" in caplog.text


def test_error_of_a_traced_call_is_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError), record_trace(tmp_path / "trace.json.gz"):
        raise KeyError("lost")
    assert (tmp_path / "trace.json.gz").exists()
