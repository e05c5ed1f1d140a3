"""Set up `.venv` for this machine; do nothing if it is complete. Needs only Python.

    python3 scripts/setup_env.py

Installs requirements.txt on a machine with an NVIDIA GPU, else requirements-cpu.txt and torch's CPU build.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "roll_gspo_setup.json"
TORCH = "2.13.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vLLM's requirements install these; their CUDA builds break `import transformers` beside a CPU torch.
CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Install the missing packages, then check the installation."""
    if sys.version_info < (3, 11):  # noqa: UP036 - `python3` may be any version
        sys.exit(
            f"roll_gspo needs Python 3.11 or later, this is {platform.python_version()}; run make PYTHON=python3.11"
        )
    gpu = has_gpu()
    wanted = fingerprint(gpu)
    if PYTHON.exists() and STAMP.is_file() and json.loads(STAMP.read_text()) == wanted:
        return
    started = time.monotonic()
    requirements = "requirements.txt" if gpu else "requirements-cpu.txt"
    report(f"setting up .venv from {requirements} ({'an NVIDIA GPU' if gpu else 'no GPU'} found), takes minutes")
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", str(VENV))
    pip("install", "--quiet", "--upgrade", "pip")
    if not gpu:
        install_cpu_torch()
    report(f"installing {requirements}")
    pip("install", "--quiet", "-r", requirements)
    if not gpu:
        remove_cuda_companions()
    check(gpu)
    STAMP.write_text(json.dumps(wanted))
    report(f".venv is ready after {time.monotonic() - started:.0f} s")


def has_gpu() -> bool:
    """Return whether the NVIDIA driver responds."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True, timeout=60).stdout.startswith(b"GPU")


def fingerprint(gpu: bool) -> dict[str, str]:
    """Return values that change if the packages to install may change."""
    digest = hashlib.sha256()
    for name in ("setup.py", "requirements.txt", "requirements-cpu.txt", "scripts/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    return {"files": digest.hexdigest(), "python": platform.python_version(), "gpu": str(gpu), "root": str(ROOT)}


def install_cpu_torch() -> None:
    """Install torch's CPU build from the configured index, or else from PyTorch's own."""
    build = f"torch=={TORCH}+cpu" if platform.system() == "Linux" else f"torch=={TORCH}"
    report(f"installing {build}")
    if pip("install", "--quiet", build, check=False) == 0:
        return
    report(f"{build} is not on the configured package index; retrying with PyTorch's own CPU wheels")
    pip("install", "--quiet", build, "--index-url", PYTORCH_CPU_INDEX)


def remove_cuda_companions() -> None:
    """Uninstall the packages of `CUDA_COMPANIONS` that are not CPU builds."""
    installed = json.loads(subprocess.check_output([PYTHON, "-m", "pip", "list", "--format", "json"], cwd=ROOT))
    versions = {package["name"].lower(): package["version"] for package in installed}
    for name in CUDA_COMPANIONS:
        if name in versions and not versions[name].endswith("+cpu") and platform.system() == "Linux":
            report(f"removing {name} {versions[name]}: a CUDA build, on a machine without a GPU")
            pip("uninstall", "--quiet", "--yes", name)


def check(gpu: bool) -> None:
    """Import the packages that a run needs and check that torch fits the machine."""
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, transformers, megatron.core, importlib.util\n"
        "assert importlib.util.find_spec('vllm'), 'vllm is missing'\n"
        f"assert torch.cuda.is_available() == {gpu}, f'torch {{torch.__version__}} does not fit this machine'\n"
        "for m in (torch, transformers, megatron.core): print('setup:', m.__name__, m.__version__)"
    )
    report("checking the installation")
    run(str(PYTHON), "-c", program)


def pip(*arguments: str, check: bool = True) -> int:
    """Run pip of the venv and return its status."""
    return run(str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments, check=check)


def run(*command: str, check: bool = True) -> int:
    """Run a command in the project's folder and return its status; exit if it fails and `check` is set."""
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code and check:
        sys.exit(f"setup: '{' '.join(command[:6])} ...' failed with status {code}")
    return code


def report(text: str) -> None:
    """Print progress."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    main()
