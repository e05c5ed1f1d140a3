from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGET = "roll_gspo.strategies.megatron.engine:MegatronTrain"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_missing_megatron_is_reported_with_its_distribution_name() -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "megatron" else find(name, package)
from roll_gspo.registry import import_target
import_target("{TARGET}", "strategy_name: megatron_train")
"""
    done = _python(code)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("pip install megatron-core")
    assert "MissingDependencyError" in done.stderr.splitlines()[-1]


@pytest.mark.megatron
def test_import_order_matters_and_is_checked() -> None:
    pytest.importorskip("megatron.core", exc_type=ImportError)
    import torch

    if torch.cuda.is_available():
        pytest.skip("the host shim is not installed where CUDA is present")
    done = _python("import megatron.core, roll_gspo.strategies.megatron.engine")
    assert done.returncode == 1 and "megatron.core is already imported" in done.stderr
    assert _python("import roll_gspo.strategies.megatron.engine, megatron.core").returncode == 0


def test_light_modules_import_no_engine() -> None:
    code = "import sys, roll_gspo.strategies.base, roll_gspo.models.weight_mapping; print(*sys.modules)"
    loaded = _python(code).stdout.split()
    assert "torch" in loaded and not {"megatron", "megatron.core", "transformers", "vllm"} & set(loaded)
