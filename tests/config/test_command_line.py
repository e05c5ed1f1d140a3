"""The command in a separate process and an empty folder. Importing an engine is forbidden."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
FORBID = """
import atexit
import sys

def check():
    loaded = {"torch", "transformers", "vllm", "megatron.core", "ray"} & set(sys.modules)
    if loaded:
        print(f"{sorted(loaded)} imported before the configuration is known to be right", file=sys.stderr, flush=True)
        import os
        os._exit(99)

atexit.register(check)
"""

pytestmark = pytest.mark.e2e


class Command:
    """Runs Python in `folder`; `root` is where the package and its YAML lie."""

    def __init__(self, folder: Path, forbid: Path, root: Path = ROOT) -> None:
        self.folder, self.root = folder, root
        (forbid / "sitecustomize.py").write_text(FORBID)
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA", "ROLL_GSPO"))}
        self._environment["PYTHONPATH"] = os.pathsep.join([str(forbid), str(root)])

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The finished process, with its output as text."""
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Standard output (or, for another exit code than 0, standard error) of `roll-gspo ...`."""
        done = self.python("-m", "roll_gspo.run", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert not list(self.folder.glob("output*")), "nothing is left behind"
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def command(tmp_path: Path) -> Command:
    for name in ("empty", "forbid"):
        (tmp_path / name).mkdir()
    return Command(tmp_path / "empty", tmp_path / "forbid")


def test_forbidden_imports_are_noticed(command: Command) -> None:
    assert "torch" in command.python("-c", "import torch").stderr


@pytest.mark.parametrize("module", ["roll_gspo.config.load", "roll_gspo.pipelines.plan", "roll_gspo.run"])
def test_module_imports_no_engine(command: Command, module: str) -> None:
    done = command.python("-c", f"import {module}, sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_help_lists_the_shipped_configurations(command: Command) -> None:
    text = command("--help")
    for name in ("example_gspo", "example_grpo", "--dry-run", "--multirun", "--config-dir"):
        assert name in text
    assert command("--help", "--config-name", "example_gspo") == text


def test_reader_that_ends_early_is_no_error(command: Command) -> None:
    script = """
import os, sys, roll_gspo.run
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
roll_gspo.run.main()
"""
    done = command.python("-c", script, "--config-name", "example_gspo", "--dry-run")
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_cfg_job_prints_the_composed_configuration(command: Command) -> None:
    composed = OmegaConf.create(command("--config-name", "example_gspo", "--cfg", "job", "max_steps=7"))
    assert (composed.importance_sampling, composed.max_steps, composed.use_pg_clip_range) == ("seq", 7, "auto")
    assert "hydra" not in composed


def test_dry_run_prints_the_plan_and_leaves_nothing(command: Command) -> None:
    text = command("--config-name", "example_gspo", "--dry-run", "importance_sampling=token")
    assert "clip 0.2/0.27 (to [0.8, 1.27]; importance_sampling: token)" in text and "plan of example_gspo" in text
    assert list(command.folder.iterdir()) == []


def test_configuration_error_exits_with_2_and_leaves_nothing(command: Command) -> None:
    text = command("--config-name", "example_gspo", "max_stps=3", "pg_clip=2", code=2)
    assert text.startswith("roll_gspo: 2 problems in the configuration\n")
    assert "max_stps: unknown key; did you mean 'max_steps'?" in text
    assert list(command.folder.iterdir()) == []


def test_several_devices_are_planned_but_refused_to_run(command: Command) -> None:
    text = command("--config-name", "qwen2.5_7b_gspo", "execution=local", code=2)
    assert "actor_train.device_mapping: 8 devices are for worker groups, but execution: local" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--config-name", "example_gsp"), "no configuration 'example_gsp'; did you mean 'example_gspo'?"),
        (("--config-name", "example_gspo", "adv_estimator=grp"), "no option 'grp'; did you mean 'grpo'? (known: "),
        (("--config-name", "example_gspo", "adv_estimator=gigpo"), "not supported yet: this estimator (see credit)"),
        (("--config-name", "example_gspo", "max_steps"), "'max_steps': expected key=value"),
        (("max_steps=3",), "--config-name: missing"),
    ],
)
def test_what_cannot_be_composed_exits_with_2(command: Command, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in command(*arguments, code=2)


def test_no_arguments_at_all_show_the_usage(command: Command) -> None:
    done = command.python("-m", "roll_gspo.run")
    assert (done.returncode, done.stdout.split(":")[0]) == (2, "usage")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [example_gspo]\nexp_name: a\n  max_steps: 3\n", "mine.yaml:3: not valid YAML: mapping values"),
        ("exp_name: a\nexp_name: b\n", "mine.yaml:2: not valid YAML: found duplicate key exp_name"),
        ("defaults: [example_gsp]\n", "no configuration 'example_gsp'; did you mean 'example_gspo'?"),
    ],
)
def test_files_that_are_not_yaml_are_named_with_the_line(command: Command, text: str, expected: str) -> None:
    (command.folder / "mine.yaml").write_text(text)
    assert expected in command("--config-dir", ".", "--config-name", "mine", code=2)


def test_own_folder_of_configurations_derives_from_a_shipped_one(command: Command) -> None:
    (command.folder / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nexp_name: mine\nmax_steps: 3\n")
    text = command("--config-dir", ".", "--config-name", "mine", "--dry-run")
    assert "plan of mine" in text and "3 steps" in text
    assert "mine.yaml:3: max_steps" not in text
    (command.folder / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nexp_name: mine\nmax_stps: 3\n")
    text = command("--config-dir=.", "--config-name=mine", "--dry-run", code=2)
    assert "  mine.yaml:3: max_stps: unknown key; did you mean 'max_steps'?" in text


def test_own_group_options_stand_beside_the_shipped_ones(command: Command) -> None:
    (command.folder / "my conf" / "data").mkdir(parents=True)
    option = "# @package _global_\nactor_train: {data_args: {file_name: sums.jsonl}}\n"
    (command.folder / "my conf" / "data" / "sums.yaml").write_text(option)
    text = command("--config-name", "example_gspo", "--config-dir", "my conf", "data=sums", "--cfg", "job")
    assert OmegaConf.create(text).actor_train.data_args.file_name == "sums.jsonl"


def test_own_file_replaces_a_shipped_one_of_the_same_name(command: Command) -> None:
    (command.folder / "mine" / "model").mkdir(parents=True)
    (command.folder / "mine" / "example_gspo.yaml").write_text("defaults: [example_grpo, _self_]\nmax_steps: 3\n")
    (command.folder / "mine" / "model" / "tiny_qwen3.yaml").write_text(
        "# @package _global_\ndefaults: [tiny_qwen3_moe]\nresponse_length: 40\n"
    )
    text = command("--config-dir", "mine", "--config-name", "example_gspo", "--dry-run")
    assert "response ≤ 40 tokens" in text and "run         3 steps" in text and "ratio       token, " in text
    for name, shipped in (("example_gspo", "examples/docs_examples"), ("model/tiny_qwen3", "conf")):
        assert f"warning     mine/{name}.yaml replaces {ROOT / shipped / name}.yaml, which has the same name" in text


def test_file_that_derives_from_its_own_name_is_refused(command: Command) -> None:
    (command.folder / "example_gspo.yaml").write_text("defaults: [example_gspo, _self_]\nmax_steps: 3\n")
    assert "rename your file" in command("--config-dir", ".", "--config-name", "example_gspo", "--dry-run", code=2)


def test_group_option_on_a_flat_file_is_told_the_plus(command: Command) -> None:
    folder = str(Path(__file__).parent)
    text = command("--config-dir", folder, "--config-name", "roll_example_gspo", "importance_sampling=token", code=2)
    assert "write +importance_sampling=OPTION to add one" in text


def test_null_of_a_group_is_its_option_none_or_explained(command: Command) -> None:
    text = command("--config-name", "example_gspo", "reward_norm=null", "kl=null", "--cfg", "job")
    composed = OmegaConf.create(text)
    assert composed.reward_norm is None and composed.use_kl_loss is False
    text = command("--config-name", "example_gspo", "adv_estimator=null", "--dry-run", code=2)
    assert "adv_estimator: null is no option of this group" in text


def test_multirun_gives_each_run_its_own_process_and_leaves_nothing(command: Command) -> None:
    (command.folder / "mine.yaml").write_text("defaults: [example_gspo, _self_]\nexp_name: mine\n")
    text = command("--config-dir", ".", "--config-name", "mine", "--multirun", "seed=0,1", "strategy=hf", "--dry-run")
    assert text.count("plan of mine") == 2 and text.index("seed 0") < text.index("seed 1")
    assert text.count("hf_train ") == 2
    assert [file.name for file in command.folder.iterdir()] == ["mine.yaml"]


def test_multirun_stops_at_the_first_configuration_error(command: Command) -> None:
    text = command("--config-name", "example_gspo", "-m", "max_steps=0,1", "--dry-run", code=2)
    assert "max_steps: should be greater than 0" in text


def test_checkout_may_lie_in_a_folder_with_spaces(tmp_path: Path, command: Command) -> None:
    root = tmp_path / "my projects, ünï"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("roll_gspo", "conf", "examples"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    moved = Command(command.folder, tmp_path / "forbid", root)
    assert "plan of example_gspo" in moved("--config-name", "example_gspo", "--dry-run")
    text = moved("--config-name", "example_grpo", "pg_clip_low=2", "use_kl_loss=false", code=2)
    assert "pg_clip_low" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("max_steps=7", "--config-name", "example_gspo", "strategy=hf", "--cfg", "job"),
        ("--cfg", "job", "max_steps=7", "strategy=hf", "--config-name=example_gspo"),
    ],
)
def test_flags_and_overrides_come_in_any_order(command: Command, arguments: tuple[str, ...]) -> None:
    composed = OmegaConf.create(command(*arguments))
    assert (composed.max_steps, composed.actor_train.strategy_args.strategy_name) == (7, "hf_train")
