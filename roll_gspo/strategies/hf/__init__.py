"""Train, score, value and generate with plain transformers and torch: the readable reference of the other engines."""

from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.hf.value import HfValue

__all__ = ["HfInfer", "HfTrain", "HfValue"]
