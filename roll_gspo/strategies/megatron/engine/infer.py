"""A frozen megatron-core model that scores given tokens: the reference of KL terms."""

from __future__ import annotations

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import ModelSetup, TokenScores
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.model import build_model
from roll_gspo.strategies.megatron.engine.scores import score


class MegatronInfer:
    """`ScoringStrategy` of a checkpoint.

    Raises:
        ConfigError: the layout or the model is not supported.
    """

    def __init__(self, model: ModelSetup, strategy_config: MegatronConfig) -> None:
        self._model = build_model(model, strategy_config)
        for chunk in self._model.chunks:
            chunk.requires_grad_(False)

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient. The result is float32 on the CPU."""
        return score(self._model, sequences, entropy)
