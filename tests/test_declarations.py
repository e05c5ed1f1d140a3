"""Declarations of policy losses, ratios and estimators: what the source text says, and functions of a user."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, DECLARED, POLICY_LOSSES, RATIOS, Functions, PolicyLoss
from roll_gspo.errors import ConfigError

SHIPPED = [(functions, name) for functions in (POLICY_LOSSES, RATIOS, ADVANTAGE_ESTIMATORS) for name in functions]
MODULE = """
from roll_gspo.declarations import AdvantageEstimator, PolicyLoss


@PolicyLoss(needs_clip_range=True, reads=("sapo_tau_positive",))
def gated(terms, settings, *, sharpness, floor=0.0):
    return terms.ratio, terms.ratio > 1


def undeclared(terms, settings):
    return terms.ratio, terms.ratio > 1


@AdvantageEstimator()
def estimator(shaped, settings):
    return shaped.rewards[:, None]


@PolicyLoss()
def one_input(terms, *, sharpness=1.0):
    return terms.ratio, terms.ratio > 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module on the path."""
    name = f"declared_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(("functions", "name"), SHIPPED, ids=lambda value: value if isinstance(value, str) else "")
def test_source_text_declares_what_the_decorator_declares(functions: Functions, name: str) -> None:
    function = functions.load(name)
    assert DECLARED[function] == functions.declaration(name)
    assert not functions.argument_problem(name, {})


def test_every_shipped_decorated_function_is_listed() -> None:
    for functions in (POLICY_LOSSES, RATIOS, ADVANTAGE_ESTIMATORS):
        module = inspect.getmodule(functions.load(next(iter(functions))))
        decorated = {f for f in DECLARED if f.__module__ == module.__name__}  # type: ignore[union-attr]
        assert decorated == {functions.load(name) for name in functions}


def test_declarations_need_no_torch() -> None:
    code = "from roll_gspo.declarations import POLICY_LOSSES as p; import sys; assert 'torch' not in sys.modules, p"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keys_of_a_need_are_read() -> None:
    assert {"pg_clip", "pg_clip_low", "dual_clip_loss"} <= set(POLICY_LOSSES.declaration("clip").keys)
    assert set(POLICY_LOSSES.declaration("sapo").keys) == {"sapo_tau_positive", "sapo_tau_negative"}
    assert set(ADVANTAGE_ESTIMATORS.declaration("gae").keys) == {"gamma", "lambd", "value_clip", "critic_warmup"}
    assert POLICY_LOSSES.readers("pg_clip") == ["clip", "cispo", "gmpo", "fspo"]


def test_function_of_a_user_is_found_by_dotted_path(module: str) -> None:
    for path in (f"{module}.gated", f"{module}:gated"):
        declared = POLICY_LOSSES.declaration(path)
        assert declared == PolicyLoss(needs_clip_range=True, reads=("sapo_tau_positive",))
        assert pickle.loads(pickle.dumps(declared)) == declared
    assert f"{module}.gated" not in POLICY_LOSSES


@pytest.mark.parametrize("name", ["undeclared", "estimator"])
def test_function_without_the_declaration_of_its_key_is_refused(module: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{module}.{name}.*@PolicyLoss"):
        POLICY_LOSSES.declaration(f"{module}.{name}")


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        ("gated", {}, "sharpness"),
        ("gated", {"sharpness": 1.0, "flor": 0.5}, "did you mean 'floor'"),
        ("one_input", {}, "positional"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    module: str, function: str, arguments: dict[str, float], named: str
) -> None:
    assert named in POLICY_LOSSES.argument_problem(f"{module}.{function}", arguments)


def test_arguments_that_fit_have_no_problem(module: str) -> None:
    assert POLICY_LOSSES.argument_problem(f"{module}.gated", {"sharpness": 1.0}) == ""


def test_module_that_fails_to_import_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_losses.py").write_text("undefined_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"policy_loss: .*NameError: name 'undefined_name'"):
        POLICY_LOSSES.declaration("broken_losses.gated")
