"""A transformers model: loading, scoring of response tokens, and weights under checkpoint names.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from roll_gspo.batch import Sequences
from roll_gspo.errors import ConfigError
from roll_gspo.models.weight_mapping import split_fused
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.log_probs import place, token_log_probs
from roll_gspo.strategies.transformers_model import predicting_rows


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
    """The live weights under checkpoint names, as views (see `WeightSource`).

    transformers 5 keeps the experts of a layer in one tensor. The checkpoint has one tensor per expert and projection.

    Args:
        model: the model.
        dtype: dtype of the yielded tensors; None yields writable views in the model's dtype.

    Raises:
        ConfigError: the checkpoint names of the model's fused weights are unknown.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype
        for name, parameter in model.named_parameters():
            known = model.config.model_type == "qwen3_moe" and split_fused(name, parameter)[0][0] != name
            if parameter.dim() == 3 and not known:
                raise ConfigError(
                    f"model_type '{model.config.model_type}': the checkpoint names of '{name}' are not known; "
                    "use a dense model or Qwen3-MoE"
                )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # named_parameters lists each tensor once, the embedding first; so a tied head is not listed
        for name, parameter in self._model.named_parameters():
            for hf_name, tensor in split_fused(name, parameter.detach()):
                yield hf_name, tensor if self._dtype is None else tensor.to(self._dtype)
