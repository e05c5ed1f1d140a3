"""The packages of a machine with GPUs: a resolver finds versions that fit together. It downloads no wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_NETWORK = re.compile(r"Failed to (fetch|download)|error sending request|Request failed|dns error|timed out", re.I)


def resolve(python: str, *requirements: str) -> dict[str, str]:
    """Return version by package for Linux with CUDA, or skip if there is no resolver or no package index."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        pytest.skip("uv is not installed: pip install 'roll-gspo[test]'")
    options = ("--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--no-annotate", "--quiet")
    done = subprocess.run(
        [uv, "pip", "compile", "-", *options],
        input="\n".join(requirements),
        cwd=ROOT,
        env={**os.environ, "UV_HTTP_TIMEOUT": "20"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr
    return dict(line.split("==") for line in done.stdout.split() if "==" in line)


@pytest.mark.slow
@pytest.mark.parametrize(("python", "megatron"), [("3.11", "0.16"), ("3.12", "0.19")])
def test_gpu_requirements_fit_together(python: str, megatron: str) -> None:
    versions = resolve(python, *(ROOT / "requirements.txt").read_text().splitlines(), "-e .[te]")
    (torch,) = re.findall(r"^torch==(.+)$", (ROOT / "requirements-cpu.txt").read_text(), re.M)
    assert versions["torch"] == torch, "the version that the suite runs with, as a CUDA build"
    assert versions["vllm"].startswith("0.32.") and versions["megatron-core"].startswith(f"{megatron}.")
    assert versions["nvidia-cuda-runtime"].startswith("13.") and versions["transformer-engine-cu13"]
