"""roll_gspo: reinforcement learning of language models from one YAML file, centred on GSPO.

`load_config`, `plan`, `train` and `evaluate` are the Python API; `roll_gspo.algorithms` holds the losses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roll_gspo.api import EvaluationResult, RunResult, evaluate, load_config, plan, train

__version__ = "0.1.0"
__all__ = ["EvaluationResult", "RunResult", "evaluate", "load_config", "plan", "train"]


def __getattr__(name: str) -> Any:
    # Hydra and pydantic are imported with the first use, so that `import roll_gspo` is immediate.
    if name in __all__:
        return getattr(import_module("roll_gspo.api"), name)
    raise AttributeError(f"module 'roll_gspo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
