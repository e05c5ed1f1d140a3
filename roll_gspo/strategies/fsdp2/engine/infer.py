"""A frozen sharded model that scores given tokens: the reference of KL terms."""

from __future__ import annotations

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import ModelSetup, TokenScores
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.model import build_sharded
from roll_gspo.strategies.fsdp2.engine.scores import score
from roll_gspo.strategies.fsdp2.engine.trainer import weight_tensors
from roll_gspo.strategies.offload import EngineState, Offloadable, Part
from roll_gspo.strategies.residency import Residency


class Fsdp2Infer(Offloadable):
    """`ScoringStrategy` of a checkpoint. If it leaves the device, it returns from the one copy on the host.

    Raises:
        ConfigError: the model is not supported.
    """

    def __init__(self, model: ModelSetup, strategy_config: Fsdp2Config) -> None:
        self._model = build_sharded(model, strategy_config, trained=False)
        module = self._model.module
        self._state = EngineState("fsdp2_infer", Part(lambda: weight_tensors(module), "constant"))

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient. The result is float32 on the CPU."""
        self._state.need(Residency.WEIGHTS, "score")
        return score(self._model, sequences, entropy)
