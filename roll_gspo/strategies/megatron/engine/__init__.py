"""Train, score and value with megatron-core; on a host without CUDA through `compat` (gloo, plain torch kernels)."""

import importlib.util
import warnings

from roll_gspo.errors import MissingDependencyError

if importlib.util.find_spec("megatron") is None:
    # the distribution has another name than the module
    raise MissingDependencyError("megatron strategies need the package 'megatron-core': pip install megatron-core")

from roll_gspo.strategies.megatron.engine import compat

compat.install()
# warnings about kernels that are not installed and about megatron's own defaults; users cannot act on them
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")

from roll_gspo.strategies.megatron.engine.infer import MegatronInfer  # noqa: E402 - megatron.core comes after install()
from roll_gspo.strategies.megatron.engine.train import MegatronTrain  # noqa: E402
from roll_gspo.strategies.megatron.engine.trained import MegatronTrained  # noqa: E402
from roll_gspo.strategies.megatron.engine.value import MegatronValue  # noqa: E402

__all__ = ["MegatronInfer", "MegatronTrain", "MegatronTrained", "MegatronValue"]
