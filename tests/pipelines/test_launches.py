from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from roll_gspo.pipelines.launches import LAUNCHES, git_commit, record_launch


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None, "no commit yet"
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit[:12]
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit[:12]}-dirty"
    assert git_commit(tmp_path / "missing") is None


def test_each_process_of_a_run_adds_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        record_launch(tmp_path)
    first, second = map(json.loads, (tmp_path / LAUNCHES).read_text().splitlines())
    assert first["host"] == second["host"] != "" and first["started"] <= second["started"]
    assert first["folder"] == str(tmp_path) and first["command"] == shlex.join(sys.orig_argv)
