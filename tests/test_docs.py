"""The documentation is executable: its commands (as --dry-run), its YAML, its Python, and its links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from commands import REWARD, REWARD_MODULE, SIZES, metrics_of, spawn
from composed import load_config
from forked_command import train

from roll_gspo.data.__main__ import main as check_data
from roll_gspo.rollout_files import read_samples

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Problems of a documented command that only the reader's own files solve.
OF_THE_READER = re.compile(r"no such file|no folder|does not exist|holds no model|needs the package|GiB free")
STOPS_BY_ITSELF = {"--dry-run", "--cfg", "--help"}
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"\s*# (\S+\.(?:yaml|py))\n")


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in a language."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for tag, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if tag == language
    ]


def files() -> dict[str, str]:
    """Name and text of every file that the pages show, without the indentation of its block."""
    texts = [text for language in ("yaml", "python") for _, text in blocks(language)]
    return {name[1]: textwrap.dedent(text) for text in texts if (name := FILE.match(text))}


def commands() -> list[str]:
    """Every documented run, once."""
    lines = (line.split("  #")[0].strip() for _, text in blocks("bash") for line in text.splitlines())
    return sorted({line for line in lines if line.startswith(("python -m roll_gspo.run", "roll-gspo "))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the files that the pages show."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "my").mkdir()
    (folder / "my/words.jsonl").write_text('{"prompt": "Say yes.", "ground_truth": "yes"}\n')
    (folder / "my/train.jsonl").write_text('{"question": "What is 2 + 2?", "answer": "#### 4"}\n')
    return folder


@pytest.mark.parametrize("command", commands())
def test_documented_command_is_a_valid_run(command: str, folder: Path) -> None:
    words = shlex.split(command)
    arguments = words[3:] if words[0] == "python" else words[1:]
    if not STOPS_BY_ITSELF & set(arguments):
        arguments = [*arguments, "--dry-run"]
    result = train(*arguments, folder=folder)
    others = [line for line in result.err.splitlines()[1:] if not OF_THE_READER.search(line)]
    assert result.code == 0 or (result.code == 2 and not others), result.err


def test_file_names_are_unique() -> None:
    texts = [text for language in ("yaml", "python") for _, text in blocks(language)]
    names = [name[1] for text in texts if (name := FILE.match(text))]
    assert sorted(names) == sorted(files())


@pytest.mark.parametrize("name", sorted(name for name in files() if name.endswith(".yaml")))
def test_documented_configuration_is_valid(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    path = folder / name
    assert load_config(path.stem, config_dir=path.parent).config


def test_documented_checks_of_data_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "my/test.jsonl").write_text('{"question": "What is 3 + 2?", "answer": "#### 5"}\n')
    lines = {line.split("  #")[0].strip() for _, text in blocks("bash") for line in text.splitlines()}
    documented = [shlex.split(line)[3:] for line in lines if line.startswith("python -m roll_gspo.data")]
    assert len(documented) >= 3
    for arguments in documented:
        assert check_data(arguments) == 0


def test_documented_commands_are_found() -> None:
    assert len(commands()) >= 8


@pytest.mark.e2e
def test_documented_reward_scores_a_run(folder: Path, pretrained: Path) -> None:
    (documented,) = [c for c in commands() if "my_rewards.short" in c]
    arguments = shlex.split(documented)[3:]
    outcome = spawn(*arguments, *SIZES, "max_steps=1", f"pretrain={pretrained}", "strategy=hf", folder=folder)
    assert outcome.code == 0, outcome.err
    (run,) = (folder / "output/example_gspo").iterdir()
    rows = read_samples(run / "rollouts/step_000001.parquet").samples
    assert {row["score"] for row in rows} <= {0.0, 1.0} and not any(row["failed"] for row in rows)
    assert all(row["score"] == float(len(row["response"].removesuffix("<|end|>")) < 20) for row in rows)


@pytest.mark.e2e
def test_documented_functions_train_a_run(folder: Path, pretrained: Path) -> None:
    (documented,) = [c for c in commands() if "my_losses.soft_clip" in c]
    arguments = shlex.split(documented)[3:]
    (folder / "my_reward.py").write_text(REWARD_MODULE)  # its scores differ within a group
    reward = f"rewards.column_addition.worker_cls={REWARD}"
    sizes = (*SIZES, "max_steps=2", f"pretrain={pretrained}", "strategy=hf", reward, "output_dir=functions")
    outcome = spawn(*arguments, *sizes, folder=folder)
    assert outcome.code == 0, outcome.err
    (run,) = (folder / "functions/example_grpo").iterdir()
    metrics = metrics_of(run)
    assert len(metrics) >= 2 and metrics[-1]["actor/grad_norm"] > 0
    assert "soft_clip (leak 0.2)" in (run / "plan.txt").read_text(encoding="utf-8")


def documented_environment() -> list[str]:
    """Return the arguments of the run of docs/agents.md with its own environment."""
    (documented,) = [c for c in commands() if "--config-name guess" in c]
    return shlex.split(documented)[3:]


@pytest.mark.e2e
def test_documented_environment_is_played(folder: Path, pretrained: Path) -> None:
    small = (*SIZES, "max_steps=1", f"pretrain={pretrained}", "output_dir=short", "run_name=run")
    outcome = train(*documented_environment(), *small, folder=folder)
    assert outcome.code == 0, outcome.err
    episodes = read_samples(folder / "short/guess/run/rollouts/step_000001.parquet").samples
    assert len(episodes) == 32 and not any(episode["failed"] for episode in episodes)
    for episode in episodes:
        for turn in episode["turns"]:
            replies = [message["content"] for message in turn["messages"]]
            assert turn["invalid"] != turn["answer"].isdigit()
            if turn["invalid"]:
                assert (turn["reward"], replies) == (-0.15, ["?"])
            elif turn["reward"]:
                assert turn["reward"] == 1 and turn is episode["turns"][-1] and episode["end"] == "done"
            else:
                assert replies in (["<"], [">"])
        assert episode["score"] == pytest.approx(sum(turn["reward"] for turn in episode["turns"]))


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(1300)
def test_model_learns_in_the_documented_environment(folder: Path) -> None:
    outcome = train(*documented_environment(), "output_dir=long", "run_name=run", folder=folder, timeout_s=1200)
    assert outcome.code == 0, outcome.err
    before, *_, after = metrics_of(folder / "long/guess/run")
    assert after["validation/score_mean"] - before["validation/score_mean"] >= 0.5


@pytest.mark.e2e
def test_python_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    page = "docs/python-api.md"
    program = "\n".join(text for name, text in blocks("python") if name == page)
    checks = """
        assert [row["step"] for row in result.metrics] == [0, 1, 2, 3, 4] and not result.stopped
        assert result.best_checkpoint.parent == result.folder / "checkpoints"
        assert (result.folder / "report.html").is_file()
        assert evaluation.score_mean == result.metrics[-1]["validation/score_mean"]
        # Ratios exp(0.05) and 1: the first sample is clipped.
        assert math.isclose(loss.item(), (-1.0004 + 1) / 2, abs_tol=1e-6), loss
        assert log_probs.grad[0].abs().sum() == 0 and log_probs.grad[1].abs().min() > 0
    """
    (tmp_path / "page.py").write_text(f"import math\n{program}\n{textwrap.dedent(checks)}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    page_py = [sys.executable, "page.py"]
    done = subprocess.run(page_py, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rollout_batch_sise: unknown key; did you mean 'rollout_batch_size'" in done.stdout


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in ((t, a) for t, a in links if "://" not in t):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_modules_exist(page: Path) -> None:
    parts = "|".join(folder.name for folder in (ROOT / "roll_gspo").iterdir() if folder.is_dir())
    named = re.findall(rf"(?<![\w/])((?:{parts})/[\w/]+\.py)\b", page.read_text(encoding="utf-8"))
    assert not [name for name in named if "NAME" not in name and not (ROOT / "roll_gspo" / name).is_file()]


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for _, text in blocks("bash") for t in re.findall(r"^make ([a-z]+)", text, re.MULTILINE)}
    assert named <= targets
