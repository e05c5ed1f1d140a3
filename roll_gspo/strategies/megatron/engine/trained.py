"""The weights of a training state of any layout, in one process and without its optimizer."""

from __future__ import annotations

from pathlib import Path

from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.infer import MegatronInfer
from roll_gspo.strategies.megatron.engine.state import load_state
from roll_gspo.strategies.megatron.engine.weights import MegatronWeights


class MegatronTrained(MegatronInfer):
    """A `ScoringStrategy` with the weights that `MegatronTrain.save` wrote.

    Args:
        model: `checkpoint` gives architecture and tokenizer.
        folder: folder of the state.

    Raises:
        ConfigError: the model is not supported.
        CheckpointError: the state is missing, damaged, of a newer format, or of another model.
    """

    def __init__(self, model: ModelSetup, folder: Path) -> None:
        super().__init__(model, MegatronConfig())
        load_state(folder, self._model, None)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout into an existing folder; config and tokenizer come from the source."""
        setup = self._model.setup
        weights = MegatronWeights(self._model.chunks, self._model.architecture, source=self._model.setup.checkpoint)
        write_checkpoint(folder, setup.checkpoint, weights, setup.dtype)
