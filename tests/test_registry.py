from __future__ import annotations

import pickle

import pytest

from roll_gspo import errors
from roll_gspo.config.pipelines import PIPELINES
from roll_gspo.config.strategy import STRATEGIES
from roll_gspo.config.trackers import TRACKERS
from roll_gspo.errors import ConfigError, MissingDependencyError
from roll_gspo.execution import EXECUTORS
from roll_gspo.registry import Registry, did_you_mean, import_target


def registry() -> Registry:
    return Registry("shape", {"circle": "math:pi", "square": "math:nothing"})


def test_name_is_imported_on_load() -> None:
    assert registry().load("circle") == pytest.approx(3.14159, abs=1e-5)


def test_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"shape: unknown name 'circel'; did you mean 'circle'\? \(known: circle"):
        registry().load("circel")


def test_taken_name_is_rejected_and_a_new_one_is_registered() -> None:
    shapes = registry()
    with pytest.raises(ConfigError, match="'circle' is already math:pi"):
        shapes.register("circle", "math:tau")
    shapes.register("turn", "math.tau")
    assert shapes.load("turn") == pytest.approx(6.28319, abs=1e-5)


def test_dotted_path_is_loaded_without_registration() -> None:
    assert registry().load("math.tau") == pytest.approx(6.28319, abs=1e-5)
    assert "math.tau" not in registry()


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("math:nothing", ConfigError, "module 'math' has no 'nothing'"),
        ("no_such_module.thing", ConfigError, "no module 'no_such_module'"),
        ("json.nowhere:thing", ConfigError, "no module 'json.nowhere'"),
    ],
)
def test_missing_target_is_a_configuration_error(target: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        import_target(target, "key")


def test_missing_package_of_a_target_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_much.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="key needs the package 'a_package_that_is_not_installed'"):
        import_target("needs_much:thing", "key")


@pytest.mark.parametrize(("name", "nearest"), [("sequence", "seq"), ("sqe", "seq"), ("xyz", None)])
def test_nearest_name_is_suggested_if_any(name: str, nearest: str | None) -> None:
    assert did_you_mean(name, ["seq", "token"]) == (f"; did you mean '{nearest}'?" if nearest else "")


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, n) for t in (EXECUTORS, PIPELINES, TRACKERS, STRATEGIES) for n in t],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_every_shipped_target_can_be_imported(table: Registry, name: str) -> None:
    if table is TRACKERS and name != "stdout":
        pytest.importorskip(name)
    assert callable(table.load(name))


@pytest.mark.parametrize("name", [n for n in dir(errors) if n.endswith("Error")])
def test_errors_can_be_pickled(name: str) -> None:
    error = vars(errors)[name]("file.yaml:3: key: text")
    assert str(pickle.loads(pickle.dumps(error))) == "file.yaml:3: key: text"
    assert isinstance(error, errors.RollGspoError)
