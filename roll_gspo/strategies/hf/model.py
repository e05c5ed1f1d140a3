"""A transformers model: loading, scoring of response tokens, and weights under checkpoint names.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from roll_gspo.batch import Sequences
from roll_gspo.errors import ConfigError
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.checkpoint_names import CheckpointNames
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.log_probs import place, token_log_probs
from roll_gspo.strategies.transformers_model import predicting_rows, train_padding_token

if TYPE_CHECKING:
    from roll_gspo.strategies.lora import Adapter


def load_model(checkpoint: Path, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Load a model onto the local device in evaluation mode. Dropout is off in training, too.

    Raises:
        ConfigError: the folder cannot be loaded, or holds only a part of the weights.
    """
    transformers_logging.disable_progress_bar()  # progress bars would disturb the console of the run
    options: Any = {"dtype": dtype, "attn_implementation": attn_implementation, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # arbitrary exceptions of model code, and of safetensors for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{checkpoint}: transformers cannot load it ({reason[:300]}); repair the folder") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would give them random values
        raise ConfigError(
            f"{checkpoint}: {len(missing)} tensors of the model are not in the weights, e.g. '{missing[0]}'; download "
            "the model again"
        )
    train_padding_token(model)
    model.to(device=local_device())
    return model.eval()


def response_scores(model: PreTrainedModel, sequences: Sequences, temperature: float, entropy: bool) -> TokenScores:
    """Return log-probs (and entropies) [B, T] of the response tokens; differentiable.

    No mask is needed: attention is causal, and padding is on the right.
    """
    shape = tuple(sequences.response_mask.shape)
    places, positions = predicting_rows(sequences)
    first, last = torch.stack(positions.aminmax()).tolist() if len(positions) else (0, 0)
    kept = torch.arange(first, last + 1, device=positions.device)
    logits = model(input_ids=sequences.input_ids, use_cache=False, logits_to_keep=kept).logits
    rows = logits[places[0], positions - first]
    log_probs, entropies = token_log_probs(rows, sequences.response_ids[places], temperature, entropy)
    return TokenScores(place(log_probs, places, shape), None if entropies is None else place(entropies, places, shape))


class HfWeights:
    """The live weights and persistent buffers under checkpoint names, as views if the layout allows it.

    transformers 5 keeps some weights in another layout, e.g. the experts of a layer in one tensor. `CheckpointNames`
    splits them (see `WeightSource`).

    Args:
        model: the model.
        dtype: dtype of the yielded weights; None yields them in the model's dtype. Buffers keep their own.
        adapter: adapter of the model, which is merged into the yielded weights; None if it has none.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, adapter: Adapter | None = None
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._adapter = adapter
        self._names = CheckpointNames(model) if adapter is None else adapter.names

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # named_parameters lists each tensor once, the embedding first; so a tied head is not listed
        for name, tensor in self._names.stream(self._parameters()):
            yield name, tensor if self._dtype is None else tensor.to(self._dtype)
        persistent = self._model.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in self._model.named_buffers() if name in persistent)
        yield from self._names.stream(buffers)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        if self._adapter is not None:
            return self._adapter.merged_parameters()
        return ((name, parameter.detach()) for name, parameter in self._model.named_parameters())

    def views(self) -> dict[str, Tensor]:
        """Return the tensors by name, after checking that writing into them changes the model.

        Raises:
            ConfigError: a tensor is a copy.
        """
        tensors = dict(self)
        copies = [name for name in self._model.state_dict() if self._names.is_copied(name)]
        if copies:
            raise ConfigError(
                f"hf_infer: model_type '{self._model.config.model_type}' keeps '{copies[0]}' in another layout, which "
                "cannot receive new weights; generate with vllm"
            )
        return tensors
