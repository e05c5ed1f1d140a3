"""Engines from outside the package: the documented example, through the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Outcome, computed, metrics_of
from safetensors.torch import load_file
from test_docs import files

import roll_gspo.export

Command = Callable[..., Outcome]
NAMES = ("my_engine/args.py", "my_engine/strategies.py", "sgd.yaml")
TRAIN = "actor_train.strategy_args"
RUNS = Path("out/sgd")


@pytest.fixture
def arguments(workplace: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Arguments of a small run of the documented files."""
    documented = files()
    for name in NAMES:
        path = workplace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(documented[name])
    monkeypatch.syspath_prepend(workplace)
    yield ("--config-dir", ".", "--config-name", "sgd", *small)
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_engine"]:
        del sys.modules[module]


def test_plan_names_a_custom_engine(command: Command, arguments: tuple[str, ...]) -> None:
    outcome = command(*arguments, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "my_engine.args.SgdTrainArgs" in outcome.out and "GiB per device" in outcome.out
    assert "my_engine.strategies" not in sys.modules, "the plan imports no torch"


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        (f"{TRAIN}.strategy_config.momentun=0.1", f"{TRAIN}.strategy_config.momentun", ("momentum",)),
        (f"{TRAIN}.strategy_config.momentum=-1", f"{TRAIN}.strategy_config.momentum", ("-1",)),
        (f"{TRAIN}.strategy_name=my_engine.args.Sgd", f"{TRAIN}.strategy_name", ("my_engine.args", "Sgd")),
        (f"{TRAIN}.strategy_name=no_engine.args.Sgd", f"{TRAIN}.strategy_name", ("no_engine.args",)),
        (
            f"{TRAIN}.strategy_name=my_engine.args.PlainInferArgs",
            f"{TRAIN}.strategy_name",
            ("PlainInferArgs", "TrainStrategyArgs"),
        ),
        ("router_replay=R2", "actor_train.router_replay.mode", ("R2", "my_engine.args.SgdTrainArgs")),
        ("+actor_train.max_tokens_per_microbatch_in_infer=99", "max_tokens_per_microbatch_in_infer", ("99",)),
        ("+actor_train.device_mapping=[0,1] execution=ray", "actor_train.device_mapping", ("SgdTrainArgs",)),
    ],
)
def test_unsupported_setting_of_a_custom_engine_is_refused(
    command: Command, arguments: tuple[str, ...], override: str, key: str, values: tuple[str, ...]
) -> None:
    outcome = command(*arguments, *override.split())
    assert outcome.code == 2
    assert f"{key}: " in outcome.err and all(value in outcome.err for value in values)


def test_custom_engine_without_a_build_method_is_refused(command: Command, arguments: tuple[str, ...]) -> None:
    with Path("my_engine/args.py").open("a") as file:
        file.write("\n\nclass Unfinished(TrainStrategyArgs):\n    pass\n")
    outcome = command(*arguments, f"{TRAIN}.strategy_name=my_engine.args.Unfinished")
    assert outcome.code == 2 and "build_train" in outcome.err


def test_custom_engine_cannot_be_the_critic_without_a_value_head(command: Command, arguments: tuple[str, ...]) -> None:
    critic = "critic.strategy_args.strategy_name=my_engine.args.SgdTrainArgs"
    outcome = command(*arguments, "adv_estimator=gae", critic)
    assert outcome.code == 2 and "critic.strategy_args.strategy_name: " in outcome.err


def test_custom_engine_trains_resumes_and_is_exported(
    command: Command, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, pretrained: Path
) -> None:
    sizes = ("max_steps=2", "save_steps=1")
    whole = command(*arguments, *sizes, "run_name=whole")
    assert whole.code == 0, whole.err
    rows = metrics_of(RUNS / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["actor/num_updates"] == 4 and row["actor/grad_norm"] > 0 for row in rows[1:])

    assert command(*arguments, *sizes, "max_steps=1", "run_name=resumed").code == 0
    resumed = command(*arguments, *sizes, "run_name=resumed", "resume_from_checkpoint=true")
    assert resumed.code == 0, resumed.err
    assert computed(RUNS / "resumed")[-1] == computed(RUNS / "whole")[-1]

    monkeypatch.setattr(sys, "argv", ["export", str(RUNS / "whole"), "exported"])
    assert roll_gspo.export.main() == 0
    initial, exported = (load_file(folder / "model.safetensors") for folder in (pretrained, Path("exported")))
    assert initial.keys() == exported.keys()
    assert any(not torch.equal(initial[name], tensor) for name, tensor in exported.items())
