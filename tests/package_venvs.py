"""Virtual environments for packages that conflict with those of the engines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
KEPT = "ROLL_GSPO_TEST_VENVS"  # a folder in which they are kept between sessions
NO_INDEX = re.compile(r"No matching distribution|Could not find a version|Connection|Temporary failure|timed out", re.I)


def python_with(extra: str, factory: pytest.TempPathFactory) -> str:
    """Return the interpreter of a virtual environment with the package of an extra of setup.py.

    The test is skipped if no package index can be reached.
    """
    found = re.search(rf'"{extra}": \["(.+)"\],', SETUP.read_text(encoding="utf-8"))
    assert found is not None
    requirement = found[1]
    parent = Path(os.environ.get(KEPT) or factory.mktemp("venvs"))
    folder = parent / re.sub(r"\W+", "_", requirement)
    python, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and NO_INDEX.search(done.stderr):
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        assert not done.returncode, done.stderr
        complete.touch()
    return str(python)
