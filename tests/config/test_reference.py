"""The tables of docs/configuration come from the schema, and the statements of its index hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from composed import load_config
from pydantic import BaseModel

from roll_gspo.config.blocks import models_in
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.legacy import IGNORED, NOT_SUPPORTED_YET
from roll_gspo.config.reference import TABLE, fill_tables, main, missing_keys
from roll_gspo.config.sft import SftConfig
from roll_gspo.errors import ConfigError, RollGspoError
from roll_gspo.run import shipped_folders

DOCS = Path(__file__).parents[2] / "docs"
INDEX = DOCS / "configuration.md"
PAGES = sorted((DOCS / "configuration").glob("*.md"))


def tables() -> str:
    """The generated rows of all pages."""
    return "\n".join(match["rows"] for page in [INDEX, *PAGES] for match in TABLE.finditer(page.read_text("utf-8")))


def test_committed_pages_are_current() -> None:
    assert main([str(DOCS), "--check"]) == 0, "run: python -m roll_gspo.config.reference docs"


def every_block(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A block and all blocks below it."""
    below = {block for info in model.model_fields.values() for block in models_in(info.annotation)}
    return {model}.union(*(every_block(block) for block in below))


@pytest.mark.parametrize("root", [ExperimentConfig, SftConfig])
def test_pages_have_every_key_with_a_meaning(root: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `([\w*.]+)` \|", tables(), flags=re.MULTILINE)
    keys = {key for block in every_block(root) for key in block.model_fields} - {"strategy_name", "strategy_config"}
    assert keys <= set(rows)
    assert all(info.description for block in every_block(root) for info in block.model_fields.values())
    assert {*IGNORED, *NOT_SUPPORTED_YET} <= set(rows)


def test_key_without_a_table_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [page.read_text("utf-8") for page in [INDEX, *PAGES]]
    assert not missing_keys(texts)
    without = [text for page, text in zip([INDEX, *PAGES], texts, strict=True) if page.name != "critic.md"]
    assert "critic.device_mapping" in missing_keys(without)
    (tmp_path / "page.md").write_text("<!-- table: critic -->\n<!-- end of table -->\n")
    assert main([str(tmp_path)]) == 1
    assert "actor_infer.device_mapping" in capsys.readouterr().err


def test_outdated_page_is_reported_and_written(tmp_path: Path) -> None:
    for page in [INDEX, *PAGES]:
        (tmp_path / page.name).write_text(page.read_text("utf-8").replace("`rollout_batch_size`", "`batch`"))
    assert main([str(tmp_path), "--check"]) == 1
    assert main([str(tmp_path)]) == 0
    assert "| `rollout_batch_size` |" in (tmp_path / "batch.md").read_text("utf-8")
    assert main([str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize(
    ("marker", "name"), [("critics", "critics"), ("critic (learning_rate)", "learning_rate")], ids=["table", "key"]
)
def test_unknown_name_in_a_marker_is_refused(marker: str, name: str) -> None:
    with pytest.raises(RollGspoError, match=rf"page\.md.*{name}"):
        fill_tables(f"<!-- table: {marker} -->\n<!-- end of table -->\n", "page.md")


def test_tables_have_the_same_number_of_cells_in_every_row() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", tables(), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_index_names_every_page() -> None:
    assert {f"configuration/{page.name}" for page in PAGES} <= set(re.findall(r"\]\(([^)#]+)\)", INDEX.read_text()))


def test_index_names_every_group_and_preset() -> None:
    text, conf = INDEX.read_text("utf-8"), shipped_folders()[1]
    groups = {folder.name for folder in conf.iterdir() if folder.is_dir()}
    presets = {file.stem for file in (conf / "algorithm").glob("*.yaml")}
    assert {f"`{name}`" for name in groups | presets} <= set(re.findall(r"`\w+`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_has_an_example(page: Path) -> None:
    assert re.search(r"^```yaml\n# my_configs/\w+\.yaml\n", page.read_text("utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        *(
            ("whiten_advantages: off", "whiten_advantages", False),
            ("whiten_advantages: no", "whiten_advantages", False),
        ),
        *(("whiten_advantages: on", "whiten_advantages", True), ("whiten_advantages: yes", "whiten_advantages", True)),
        *(("max_steps: 010", "max_steps", 8), ("kl_loss_coef: 1e-6", "kl_loss_coef", 1e-6)),
        *(('exp_name: "2024"', "exp_name", "2024"), ("track_with: none", "track_with", ())),
        *(("reward_clip: null", "reward_clip", None), ("run_name: ${exp_name}_a", "run_name", "example_gspo_a")),
        ("run_name: ${oc.env:ROLL_GSPO_NOT_SET,b}", "run_name", "b"),
    ],
)
def test_values_are_read_as_documented(tmp_path: Path, text: str, key: str, value: object) -> None:
    (tmp_path / "mine.yaml").write_text(f"defaults: [example_gspo, _self_]\n{text}\n")
    assert load_config("mine", config_dir=tmp_path).config.model_dump()[key] == value


def test_command_line_wins_over_the_body_and_the_body_over_the_group(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nmax_steps: 5\npg_clip_low: 0.001\n")
    config = load_config("mine", "max_steps=6", config_dir=tmp_path).config
    assert (config.max_steps, config.clip_range, config.gamma) == (6, (0.001, 4e-4), 1.0)


@pytest.mark.parametrize("value", ["1.5", "'\"1\"'", "true"])
def test_types_are_not_converted(value: str) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        load_config("example_gspo", f"max_steps={value}")
