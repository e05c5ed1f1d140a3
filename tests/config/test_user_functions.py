"""Policy losses, ratios and estimators of a user, selected by dotted path."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from composed import load_config
from config_problems import problem_of, problems_of

from roll_gspo.pipelines.plan import make_plan

MODULE = """
from roll_gspo.declarations import AdvantageEstimator, ImportanceRatio, PolicyLoss


@PolicyLoss()
def plain(terms, settings, *, sharpness=1.0):
    return -terms.ratio * terms.advantages, terms.ratio > 1


@PolicyLoss(needs_clip_range=True, needs_reference=True, reads=("sapo_tau_positive",))
def demanding(terms, settings, *, sharpness):
    return -terms.ratio * terms.advantages, terms.ratio > 1


@PolicyLoss(own_ratio="its maximum")
def maximum(terms, settings):
    return -terms.log_ratio.amax(-1, keepdim=True).exp() * terms.advantages, terms.ratio > 1


@PolicyLoss(reads=("sharpnes",))
def reads_unknown(terms, settings):
    return -terms.ratio * terms.advantages, terms.ratio > 1


def undeclared(terms, settings):
    return -terms.ratio * terms.advantages, terms.ratio > 1


@ImportanceRatio(scale="sequence")
def ratio(log_ratio, response_mask):
    return log_ratio.exp()


@AdvantageEstimator(needs_critic=True, compares_group=True, reads=("lambd",))
def critical(shaped, settings, *, weight=0.5):
    return shaped.rewards[:, None] - weight * shaped.values
"""
PAPER = ("loss_agg_mode=seq-mean-token-mean",)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module on the path."""
    name = f"functions_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_path_on_the_command_line_selects_the_function(module: str) -> None:
    config = load_config("example_gspo", f"policy_loss={module}.plain", "policy_loss_args.sharpness=2.5").config
    assert (config.policy_loss, config.policy_loss_args) == (f"{module}.plain", {"sharpness": 2.5})
    assert config.clip_range is None and not config.use_pg_clip_range


def test_path_with_a_colon_selects_the_function(module: str) -> None:
    assert load_config("example_gspo", f"policy_loss={module}:plain").config.policy_loss == f"{module}:plain"


def test_declared_clip_range_and_reference_are_provided(module: str) -> None:
    overrides = (f"policy_loss={module}.demanding", "policy_loss_args.sharpness=1.0", "kl=none", *PAPER)
    config = load_config("example_gspo", *overrides, "sapo_tau_positive=2.0").config
    assert config.clip_range == (3e-4, 4e-4) and config.needs_reference and not config.use_kl_loss
    problem = problem_of(*overrides, "~reference")
    assert problem.key == "policy_loss" and problem.names("reference")


def test_defaults_list_of_a_file_selects_the_function(module: str, tmp_path: Path) -> None:
    text = f"""\
        defaults:
          - example_gspo
          - override policy_loss: {module}.plain
          - override adv_estimator: grpo
          - _self_

        policy_loss_args: {{sharpness: 3.0}}
        """
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(text))
    config = load_config("mine", config_dir=tmp_path).config
    assert (config.policy_loss, config.policy_loss_args["sharpness"]) == (f"{module}.plain", 3.0)


def test_option_file_of_a_user_selects_the_function(module: str, tmp_path: Path) -> None:
    (tmp_path / "policy_loss").mkdir()
    lines = ("# @package _global_", f"policy_loss: {module}.plain", "policy_loss_args: {sharpness: 4.0}")
    (tmp_path / "policy_loss/sharp.yaml").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text("defaults: [example_gspo, _self_]\n")
    config = load_config("mine", "policy_loss=sharp", config_dir=tmp_path).config
    assert (config.policy_loss, config.policy_loss_args["sharpness"]) == (f"{module}.plain", 4.0)


def test_body_that_overrides_a_chosen_option_is_refused(module: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"defaults: [example_gspo, _self_]\npolicy_loss: {module}.plain\n")
    (problem,) = (p for p in problems_of("mine", config_dir=tmp_path) if p.key == "policy_loss")
    assert problem.where.endswith("mine.yaml:2") and problem.names("clip")


def test_plan_shows_paths_arguments_and_declared_values(module: str) -> None:
    overrides = (f"policy_loss={module}.demanding", "policy_loss_args.sharpness=0.5", *PAPER)
    rows = dict(make_plan(load_config("example_gspo", *overrides).config).rows)
    text = f"seq, {module}.demanding (sapo_tau_positive 1, sharpness 0.5) 0.0003/0.0004 (to [0.9997, 1.0004]"
    assert rows["ratio"].startswith(f"{text}; importance_sampling: seq), seq-mean-token-mean")


def test_declared_scale_of_a_ratio_decides_on_the_warning(module: str) -> None:
    overrides = (f"importance_sampling={module}.ratio", *PAPER)
    (warning,) = make_plan(load_config("example_gspo", *overrides).config).warnings
    assert warning.key == "importance_sampling" and "0.2" in warning.message


def test_estimator_with_a_critic_needs_the_block_and_groups(module: str) -> None:
    path = f"{module}.critical"
    assert problem_of(f"adv_estimator={path}").key == "adv_estimator"
    critic = "+critic={training_args:{learning_rate:1e-3,per_device_train_batch_size:32,gradient_accumulation_steps:2}"
    block = f"{critic},strategy_args:{{strategy_name:hf_train}}}}"
    overrides = (f"adv_estimator={path}", block, "adv_estimator_args.weight=0.25")
    config = load_config("example_gspo", *overrides, "lambd=0.5", "critic_warmup=1", "value_clip=0.2").config
    assert config.needs_critic and config.adv_estimator_args == {"weight": 0.25}
    small = ("num_return_sequences_in_group=1", "actor_train.training_args.gradient_accumulation_steps=1")
    problem = problem_of(*overrides, *small, "critic.training_args.gradient_accumulation_steps=1")
    assert problem.key == "adv_estimator" and problem.names(path)


@pytest.mark.parametrize(
    ("overrides", "key", "named"),
    [
        (("policy_loss={module}.plain", "+policy_loss_args.sharpnes=1"), "policy_loss_args", "sharpnes"),
        (("policy_loss={module}.plain", "sapo_tau_positive=2.0"), "sapo_tau_positive", "sapo"),
        (("policy_loss={module}.plain", "pg_clip=0.1"), "pg_clip", "cispo"),
        (("policy_loss={module}.demanding",), "policy_loss_args", "sharpness"),
        (("policy_loss={module}.maximum",), "policy_loss", "importance_sampling"),
        (("policy_loss={module}.reads_unknown",), "policy_loss", "sharpnes"),
        (("policy_loss={module}.undeclared",), "policy_loss", "PolicyLoss"),
        (("policy_loss={module}.critical",), "policy_loss", "PolicyLoss"),
        (("policy_loss={module}.absent",), "policy_loss", "absent"),
        (("policy_loss=no_such_module.absent",), "policy_loss", "no_such_module"),
        (("adv_estimator={module}.critical",), "adv_estimator", "critic"),
        (("adv_estimator={module}.critical", "gamma=0.9"), "gamma", "reinforce"),
        (("policy_loss_args.sharpness=1",), "policy_loss_args", "clip"),
        (("importance_sampling_args.power=1",), "importance_sampling_args", "seq"),
        (("adv_estimator_args.weight=1",), "adv_estimator_args", "reinforce"),
    ],
)
def test_function_that_does_not_fit_is_refused_with_its_key(
    module: str, overrides: tuple[str, ...], key: str, named: str
) -> None:
    problems = problems_of("example_gspo", *(o.format(module=module) for o in overrides))
    assert key in {problem.key for problem in problems}
    assert any(problem.key == key and problem.names(named) for problem in problems)


def test_missing_module_in_a_flat_file_has_its_line(tmp_path: Path) -> None:
    flat = load_config("example_gspo").config.model_dump(mode="json") | {"policy_loss": "no_such_module.gated"}
    (tmp_path / "flat.yaml").write_text(yaml.safe_dump(flat))
    problem = problem_of(name="flat", config_dir=tmp_path)
    assert problem.key == "policy_loss" and "flat.yaml:" in problem.where and problem.names("no_such_module")
