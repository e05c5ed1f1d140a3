"""docs/configuration.md is printed from the schema, and what its introduction says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from composed import load_config
from pydantic import BaseModel

from roll_gspo.config.blocks import models_in
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.legacy import IGNORED, NOT_SUPPORTED_YET
from roll_gspo.config.reference import page
from roll_gspo.errors import ConfigError
from roll_gspo.run import shipped_folders

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run: python -m roll_gspo.config.reference > docs/configuration.md"
    )


def every_block(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A block and all blocks below it."""
    below = {block for info in model.model_fields.values() for block in models_in(info.annotation)}
    return {model}.union(*(every_block(block) for block in below))


def test_page_has_every_key_with_a_meaning() -> None:
    rows = re.findall(r"^\| `([\w*.]+)` \|", page(), flags=re.MULTILINE)
    keys = {key for block in every_block(ExperimentConfig) for key in block.model_fields} - {
        "strategy_name",
        "strategy_config",
    }
    assert keys <= set(rows)
    assert all(info.description for block in every_block(ExperimentConfig) for info in block.model_fields.values())
    assert {*IGNORED, *NOT_SUPPORTED_YET} <= set(rows)


def test_tables_have_the_same_number_of_cells_in_every_row() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page(), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_page_names_every_group() -> None:
    introduction = page().split("## Keys")[0]
    for group in (folder for folder in shipped_folders()[1].iterdir() if folder.is_dir()):
        assert f"`{group.name}`" in introduction


def test_page_names_every_preset() -> None:
    introduction = page().split("## Keys")[0]
    for preset in (shipped_folders()[1] / "algorithm").glob("*.yaml"):
        assert f"`{preset.stem}`" in introduction


def test_file_in_the_introduction_validates(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", page(), flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    assert "defaults" in yaml.safe_load(text)
    config = load_config("mine", config_dir=tmp_path).config
    assert (config.exp_name, config.kl_loss_coef, config.pretrain) == ("mine", 0.01, "builtin:tiny_qwen3_moe")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        *(
            ("whiten_advantages: off", "whiten_advantages", False),
            ("whiten_advantages: no", "whiten_advantages", False),
        ),
        *(("whiten_advantages: on", "whiten_advantages", True), ("whiten_advantages: yes", "whiten_advantages", True)),
        *(("max_steps: 010", "max_steps", 8), ("kl_loss_coef: 1e-6", "kl_loss_coef", 1e-6)),
        *(('exp_name: "2024"', "exp_name", "2024"), ("track_with: none", "track_with", "none")),
        *(("reward_clip: null", "reward_clip", None), ("run_name: ${exp_name}_a", "run_name", "example_gspo_a")),
        ("run_name: ${oc.env:ROLL_GSPO_NOT_SET,b}", "run_name", "b"),
    ],
)
def test_values_are_read_as_the_page_says(tmp_path: Path, text: str, key: str, value: object) -> None:
    default = "- override tracker: none\n" if "track" in text else ""
    defaults = (
        f"defaults:\n  - example_gspo\n  {default}  - _self_\n" if default else "defaults: [example_gspo, _self_]\n"
    )
    (tmp_path / "mine.yaml").write_text(f"{defaults}{text}\n")
    assert load_config("mine", config_dir=tmp_path).config.model_dump()[key] == value


def test_command_line_wins_over_the_body_and_the_body_over_the_group(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nmax_steps: 5\npg_clip_low: 0.001\n")
    config = load_config("mine", "max_steps=6", config_dir=tmp_path).config
    assert (config.max_steps, config.clip_range, config.gamma) == (6, (0.001, 4e-4), 1.0)


@pytest.mark.parametrize("value", ["1.5", "'\"1\"'", "true"])
def test_types_are_not_converted(value: str) -> None:
    with pytest.raises(ConfigError, match="valid integer"):
        load_config("example_gspo", f"max_steps={value}")
