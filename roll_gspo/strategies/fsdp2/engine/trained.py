"""The weights of a training state of any number of ranks, in one process and without its optimizer."""

from __future__ import annotations

from pathlib import Path

from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.infer import Fsdp2Infer
from roll_gspo.strategies.fsdp2.engine.state import load_weights
from roll_gspo.strategies.fsdp2.engine.weights import ShardedWeights
from roll_gspo.strategies.gathering import write_by_first_rank


class Fsdp2Trained(Fsdp2Infer):
    """A `ScoringStrategy` with the weights that `Fsdp2Train.save` wrote. They are read one stored piece at a time.

    Args:
        model: `checkpoint` gives architecture and tokenizer.
        strategy_config: options of the engine.
        folder: folder of the state.

    Raises:
        ConfigError: the model is not supported.
        CheckpointError: the state is missing, damaged, of a newer format, or of another model.
    """

    def __init__(self, model: ModelSetup, strategy_config: Fsdp2Config, folder: Path) -> None:
        super().__init__(model, strategy_config)
        load_weights(folder, dict(self._model.module.named_parameters()))

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout into an existing folder; config and tokenizer come from the source."""
        setup = self._model.setup
        write_by_first_rank(folder, setup, ShardedWeights(self._model.module, self._model.names, setup.dtype))
