"""The keys that choose trackers: names, lists, options, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config
from config_problems import derived_config, problem_of

from roll_gspo.config.legacy import sift


@pytest.mark.parametrize(
    ("value", "names"),
    [
        *(("none", ()), ("null", ()), ("[]", ()), ("[none]", ()), ("wandb", ("wandb",))),
        *(("[tensorboard,wandb]", ("tensorboard", "wandb")), ("my.module.Tracker", ("my.module.Tracker",))),
    ],
)
def test_track_with_takes_a_name_or_a_list(value: str, names: tuple[str, ...]) -> None:
    assert load_config("example_gspo", f"track_with={value}").config.track_with == names


def test_default_is_tensorboard() -> None:
    config = load_config("example_gspo").config
    assert (config.track_with, config.tracker_options, config.tags) == (("tensorboard",), {"tensorboard": {}}, ())


def test_body_replaces_the_tracker_of_the_base_file(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "track_with: [mlflow, stdout]\n")
    assert load_config("mine", config_dir=folder).config.track_with == ("mlflow", "stdout")
    problem = problem_of("tracker=wandb", name="mine", config_dir=folder)
    assert problem.where.endswith("mine.yaml:3") and problem.key == "track_with" and problem.names("wandb")


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        ("{wandb: {project: p, mode: null}, mlflow: {name: n}}", {"wandb": {"project": "p"}, "tensorboard": {}}),
        ("{mlflow: {name: n}}", {"wandb": {}, "tensorboard": {}}),
        ("{}", {"wandb": {}, "tensorboard": {}}),
    ],
)
def test_options_belong_to_the_tracker_of_their_block(tmp_path: Path, kwargs: str, options: object) -> None:
    folder = derived_config(tmp_path, f"track_with: [wandb, tensorboard]\ntracker_kwargs: {kwargs}\n")
    assert load_config("mine", config_dir=folder).config.tracker_options == options


def test_options_of_the_only_tracker_need_no_block() -> None:
    config = load_config("example_gspo", "tracker_kwargs.log_dir=logs").config
    assert config.tracker_options == {"tensorboard": {"log_dir": "logs"}}
    assert load_config("example_gspo", "tracker_kwargs.log_dir=logs", "tracker=none").config.tracker_options == {}


@pytest.mark.parametrize(
    ("overrides", "key", "named"),
    [
        (("track_with=[wandb,tensorbord]",), "track_with", ("tensorbord", "tensorboard")),
        (("track_with=[wandb,wandb]",), "track_with", ("wandb", 2)),
        (("track_with=[stdout,wandb]", "tracker_kwargs.mode=offline"), "tracker_kwargs.mode", ("stdout",)),
        (("tracker_kwargs.wandb=offline",), "tracker_kwargs.wandb", ("offline",)),
        (("track_with=3",), "track_with", (3,)),
        (("tracker_kwargs.tags=[a]",), "tracker_kwargs.tags", ("tags",)),
    ],
)
def test_wrong_tracker_is_refused(overrides: tuple[str, ...], key: str, named: tuple[object, ...]) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key and problem.names(*named)


def test_password_in_a_file_is_refused_and_not_printed() -> None:
    (problem,) = sift({"tracker_kwargs": {"api_key": "secret"}}).refusals
    assert problem.key == "tracker_kwargs.api_key" and "WANDB_API_KEY" in problem.message
    assert "secret" not in problem.message
