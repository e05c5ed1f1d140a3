"""Defaults that depend on other keys: their values, and that a key of the user wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config
from config_problems import derived_config, problem_of

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.run_folder import config_yaml


def load(*overrides: str, name: str = "example_gspo") -> ExperimentConfig:
    return load_config(name, *overrides).config


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        (("pg_clip_low=0.001",), (0.001, 4e-4)),
        (("pg_clip_high=0.001",), (3e-4, 0.001)),
        (("pg_clip_low=null",), (3e-4, 4e-4)),
        (("use_pg_clip_range=false", "pg_clip=0.3"), (0.3, 0.3)),
        (("use_pg_clip_range=false",), (0.2, 0.2)),
        (("pg_clip_ranges.seq=[1e-3,2e-3]",), (1e-3, 2e-3)),
        (("pg_clip_ranges.token=[0.1,0.1]",), (3e-4, 4e-4)),
        (("algorithm=dapo", "pg_clip_ranges.token=[0.1,0.1]"), (0.1, 0.1)),
        (("algorithm=dapo", "pg_clip_high=0.3"), (0.2, 0.3)),
        (("policy_loss=cispo", "pg_clip_ranges.seq=[1e-3,2e-3]"), (1.0, 4.0)),
    ],
)
def test_clip_range_that_is_set_wins(overrides: tuple[str, ...], bounds: tuple[float, float]) -> None:
    assert load(*overrides).clip_range == bounds


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+pg_clip_ranges.tokn=[0.1,0.1]", "pg_clip_ranges.tokn"),
        ("+pg_clip_ranges.token=[0.1]", "pg_clip_ranges.token.1"),
        ("+pg_clip_ranges.token=[1.1,0.1]", "pg_clip_ranges.token.0"),
        ("+pg_clip_ranges=0.1", "pg_clip_ranges"),
        ("use_pg_clip_range=automatic", "use_pg_clip_range"),
    ],
)
def test_wrong_value_of_a_clip_key_is_one_problem(override: str, key: str) -> None:
    assert problem_of(override).key == key


def test_switches_that_are_auto_follow_the_policy_loss(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "dual_clip_loss: auto\nuse_pg_clip_range: auto\n")
    for loss, has_range, has_dual_clip in (("clip", True, True), ("cispo", True, False), ("sapo", False, False)):
        config = load_config("mine", f"policy_loss={loss}", config_dir=folder).config
        assert (config.use_pg_clip_range, config.dual_clip_loss) == (has_range, has_dual_clip)


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ((), 10),
        (("response_length=100",), 20),
        (("~response_length", "sequence_length=116"), 20),
        (("overlong_buffer_length=7",), 7),
        (("overlong_buffer_length=0.5",), 24),
        (("overlong_buffer_length=0.001",), 1),
        (("overlong_buffer_length=null",), None),
    ],
)
def test_overlong_buffer_may_be_a_share_of_the_response(overrides: tuple[str, ...], length: int | None) -> None:
    assert load(*overrides, name="example_dapo").overlong_buffer_length == length


def test_overlong_buffer_of_the_whole_response_is_refused() -> None:
    assert problem_of("overlong_buffer_length=1.0").key == "overlong_buffer_length"


@pytest.mark.parametrize(
    ("overrides", "task"),
    [
        ((), "column_addition"),
        (("data=multi_domain",), "multi_domain"),
        (("data=gsm8k",), "column_addition"),
        (("data=multi_domain", "warm_start.demonstrations=builtin:column_addition"), "column_addition"),
    ],
)
def test_warm_start_demonstrates_the_task_of_the_data(overrides: tuple[str, ...], task: str) -> None:
    warm_start = load(*overrides).warm_start
    assert warm_start is not None and warm_start.demonstrations == f"builtin:{task}"


def test_warm_start_of_the_option_model_follows_pretrain(tmp_path: Path) -> None:
    assert load("pretrain=some/model").warm_start is None
    assert load("pretrain=builtin:tiny_qwen3_moe").warm_start is not None
    problem = problem_of("pretrain=some/model", "warm_start.steps=9")
    assert problem.key == "warm_start" and problem.where == "command line (warm_start.steps=9)"
    own = "defaults: [example_gspo, _self_]\npretrain: some/model\n"
    (tmp_path / "mine.yaml").write_text(own)
    assert load_config("mine", config_dir=tmp_path).config.warm_start is None
    (tmp_path / "mine.yaml").write_text(f"{own}warm_start: {{steps: 9}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:3: warm_start: is for builtin: models"):
        load_config("mine", config_dir=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [((), 1e-3), (("model=qwen2.5_7b",), 1e-5), (("critic.training_args.learning_rate=3e-4",), 3e-4)],
)
def test_learning_rate_of_the_critic_depends_on_the_model(overrides: tuple[str, ...], rate: float) -> None:
    critic = load("adv_estimator=gae", *overrides).critic
    assert critic is not None and critic.training_args.learning_rate == rate


@pytest.mark.parametrize("name", ["example_gspo", "example_dapo", "example_ppo", "example_cispo", "example_sapo"])
def test_config_of_a_run_is_valid_and_equal(name: str, tmp_path: Path) -> None:
    config = load(name=name)
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert load_config("again", config_dir=tmp_path).config == config
