"""A frozen megatron-core model that scores given tokens: the reference of KL terms."""

from __future__ import annotations

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import ModelSetup, TokenScores
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.model import build_model
from roll_gspo.strategies.megatron.engine.offload import weight_tensors
from roll_gspo.strategies.megatron.engine.scores import score
from roll_gspo.strategies.offload import EngineState, Offloadable, Part
from roll_gspo.strategies.residency import Residency


class MegatronInfer(Offloadable):
    """`ScoringStrategy` of a checkpoint. If it leaves the device, it returns from the one copy on the host.

    Raises:
        ConfigError: the layout or the model is not supported.
    """

    def __init__(self, model: ModelSetup, strategy_config: MegatronConfig) -> None:
        self._model = build_model(model, strategy_config)
        for chunk in self._model.chunks:
            chunk.requires_grad_(False)
        chunks = self._model.chunks
        self._state = EngineState("megatron_infer", Part(lambda: weight_tensors(chunks), "constant"))

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient. The result is float32 on the CPU."""
        self._state.need(Residency.WEIGHTS, "score")
        return score(self._model, sequences, entropy)
