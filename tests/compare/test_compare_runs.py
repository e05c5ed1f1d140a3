from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from compared_runs import config_text, write_run, write_sweep

from roll_gspo.compare.differences import IGNORED_KEYS, config_identity, count_equal, differences, group_labels
from roll_gspo.compare.runs import find_runs, group_runs, load_run
from roll_gspo.errors import DataError


def config(*overrides: str) -> dict:
    return yaml.safe_load(config_text(*overrides))


def test_find_runs_returns_each_run_once(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", seeds=1)
    alone = write_run(tmp_path / "alone")
    (alone / "checkpoints" / "metrics_of_another").mkdir(parents=True)
    shutil.copy(alone / "metrics.jsonl", alone / "checkpoints" / "metrics_of_another")
    found = find_runs([sweep, alone, tmp_path / "sweep" / ".." / "alone", tmp_path])
    assert [run.name for run in found] == ["000_algorithm-gspo_seed-0", "001_algorithm-grpo_seed-0", "alone"]


@pytest.mark.parametrize(("name", "message"), [("missing", "no such folder"), ("empty", "no run in it or below it")])
def test_find_runs_raises_for_paths_without_runs(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    with pytest.raises(DataError, match=message) as error:
        find_runs([tmp_path / "run", tmp_path / name])
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no config.yaml"), ("a: [", "not valid YAML"), ("- a list", "not a run's configuration")],
)
def test_load_run_raises_for_a_broken_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    run = write_run(tmp_path / "broken")
    (run / "config.yaml").unlink()
    if text is not None:
        (run / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_run(run)
    assert str(run) in str(error.value)


def test_runs_that_differ_in_seed_names_and_folders_only_are_one_group(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    groups = group_runs([load_run(folder) for folder in find_runs([tmp_path])])
    assert [(group.label, [run.seed for run in group.runs], group.num_runs) for group in groups] == [
        ("gspo", ["0", "1", "2"], "3 seeds"),
        ("grpo", ["0", "1", "2"], "3 seeds"),
    ]


def test_repeated_seed_counts_as_two_runs(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, seed=seed)) for name, seed in (("a", 10), ("b", 2), ("c", 2))]
    (group,) = group_runs(runs)
    assert [run.seed for run in group.runs] == ["2", "2", "10"]
    assert group.num_runs == "3 runs"


@pytest.mark.parametrize("key", sorted(IGNORED_KEYS))
def test_identity_ignores_names_and_folders(key: str) -> None:
    first = config()
    assert key in first, "unknown key"
    assert config_identity({**first, key: "another"}) == config_identity(first)


@pytest.mark.parametrize("override", ["pg_clip_low=0.1", "actor_train.training_args.learning_rate=1e-5", "max_steps=7"])
def test_identity_changes_with_everything_else(override: str) -> None:
    assert config_identity(config(override)) != config_identity(config())


def test_differences_name_nested_keys_and_their_values() -> None:
    rows = differences([config("seed=1"), config("actor_train.training_args.learning_rate=0.5", "seed=2")])
    assert [row.key for row in rows] == ["actor_train.training_args.learning_rate"]
    assert rows[0].values[1] == "0.5"


def test_differences_show_a_missing_block_as_one_key() -> None:
    block = {"strategy": "hf", "sizes": [1, 2], **{f"key_{i}": i for i in range(20)}}
    rows = differences([{"critic": None, "same": 1}, {"critic": block, "same": 1}, {"same": 1}])
    assert [row.key for row in rows] == ["critic"]
    none, text, absent = rows[0].values
    assert (none, absent) == ("null", "—")
    assert text.startswith("strategy: hf\nsizes:\n- 1\n") and text.endswith("more lines")


def test_number_of_equal_values_and_differences_add_up() -> None:
    first, second = {"a": 1, "b": {"c": 2, "d": 3}, "seed": 1}, {"a": 1, "b": {"c": 2, "d": 4}, "seed": 2}
    assert (count_equal([first, second]), len(differences([first, second]))) == (2, 1)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (
            [{"run_name": f"00{i}_algorithm-{a}_seed-0", "seed": 0, "x": a} for i, a in ((0, "gspo"), (3, "grpo"))],
            ["gspo", "grpo"],
        ),
        (
            [{"run_name": "000_algorithm-gspo_paper_seed-0", "seed": 0}, {"run_name": None, "exp_name": "mine"}],
            ["gspo_paper", "mine"],
        ),
        (
            [
                {"run_name": f"00{i}_algorithm-gspo_a.b-{v}_seed-0", "a": {"b": v}, "seed": 0}
                for i, v in ((0, 1), (1, 2))
            ],
            ["b=1", "b=2"],
        ),
        (
            [{"exp_name": "e", "a": {"lr": 1}}, {"exp_name": "e", "a": {"lr": 2}}, {"exp_name": "f", "a": {"lr": 1}}],
            ["e, lr=1", "e, lr=2", "f"],
        ),
        (
            [{"exp_name": "e", "a": {"lr": 1}, "b": {"lr": i}} for i in (1, 2)],
            ["lr=1", "lr=2"],
        ),
        (
            [{"exp_name": "e", "one": 1, "two": i, "three": i // 2} for i in range(4)],
            ["two=0", "two=1", "two=2", "two=3"],
        ),
        (
            [{"exp_name": "e", "text": "x" * 40 + end} for end in "ab"],
            ["text=" + "x" * 24 + " (variant 1)", "text=" + "x" * 24 + " (variant 2)"],
        ),
        ([{"exp_name": "only"}], ["only"]),
    ],
)
def test_labels_distinguish_the_groups(configs: list[dict], expected: list[str]) -> None:
    assert group_labels(configs) == expected


def test_labels_are_the_names_of_presets(tmp_path: Path) -> None:
    presets = ("gspo", "gspo_paper", "gspo_token", "grpo", "dr_grpo", "raft_plus_plus")
    write_sweep(tmp_path, seeds=1, algorithms=presets)
    groups = group_runs([load_run(folder) for folder in find_runs([tmp_path])])
    assert tuple(group.label for group in groups) == presets
