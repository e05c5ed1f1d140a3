"""The Python API beside the commands. docs/python-api.md, which a test runs, covers the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import roll_gspo
from roll_gspo.errors import ConfigError


def test_public_names_are_found_at_first_use() -> None:
    assert set(roll_gspo.__all__) <= set(dir(roll_gspo))
    assert all(callable(vars(roll_gspo).get(name) or getattr(roll_gspo, name)) for name in roll_gspo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        roll_gspo.trian  # type: ignore[attr-defined]  # noqa: B018


def test_own_folder_of_configurations(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nexp_name: mine\nmax_steps: 3\n")
    config = roll_gspo.load_config("mine", ["seed=7"], config_dir=tmp_path)
    assert (config.exp_name, config.max_steps, config.seed) == ("mine", 3, 7)
    assert "plan of mine" in roll_gspo.plan(config).text()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("mien", [], r"--config-name: no configuration 'mien'; did you mean 'mine'"),
        ("mine", ["strategy=huggingface"], r"strategy: no option 'huggingface'"),
        ("mine", ["max_steps=-1"], r"max_steps: .*got -1"),
        ("broken", [], r"broken.yaml:3: not valid YAML"),
    ],
)
def test_problems_are_configuration_errors(tmp_path: Path, name: str, overrides: list[str], message: str) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_gspo, _self_]\n")
    (tmp_path / "broken.yaml").write_text("defaults: [example_gspo]\nseed: [\n")
    with pytest.raises(ConfigError, match=message):
        roll_gspo.load_config(name, overrides, config_dir=tmp_path)
    assert not GlobalHydra.instance().is_initialized()


def test_keys_of_roll_without_effect_are_warnings() -> None:
    with pytest.warns(UserWarning, match="ignored, delete it: base_dir"):
        roll_gspo.load_config("example_gspo", ["base_dir=here"])


def test_state_of_an_outer_hydra_application_is_kept() -> None:
    outer = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = marker = object()  # type: ignore[assignment]
    try:
        roll_gspo.load_config("example_gspo")
        assert HydraConfig.instance().cfg is marker
    finally:
        HydraConfig.instance().cfg = outer


def test_callback_ends_the_run_with_a_checkpoint(
    small: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    seen: dict[int, float] = {}

    def stop_after_one(step: int, metrics: object) -> bool:
        seen[step] = metrics["reward/score_mean"]  # type: ignore[index]
        return True

    config = roll_gspo.load_config("example_gspo", ["strategy=hf", *small, "run_name=run"])
    result = roll_gspo.train(config, callbacks=[stop_after_one, lambda step, metrics: None])
    assert result.stopped and result.folder == Path("out/example_gspo/run")
    assert [row["step"] for row in result.metrics] == [0, 1]
    assert seen == {1: result.metrics[1]["reward/score_mean"]}
    assert [checkpoint.step for checkpoint in result.checkpoints] == [1] and result.best is None
    assert result.best_checkpoint == result.checkpoints[0].folder
