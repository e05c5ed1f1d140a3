"""A transformers model: loading, scoring of response tokens, and weights under checkpoint names.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from roll_gspo.batch import Sequences
from roll_gspo.errors import ConfigError
from roll_gspo.models.weight_mapping import split_fused
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.head_products import float32_logits
from roll_gspo.strategies.log_probs import place, token_log_probs


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


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of every layer for the backward pass; the rest is computed again.

    `gradient_checkpointing_enable` of transformers needs the training mode, which switches dropout on.

    Raises:
        ConfigError: the model's code does not mark its layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"strategy_config.gradient_checkpointing: transformers cannot recompute layers of model_type "
            f"'{model.config.model_type}'; set it to false"
        )
    for layer in layers:
        layer.forward = partial(_forward_of_layer, layer.forward)


def _forward_of_layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No random state is kept, because nothing is random without dropout.
    return recomputed(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def compute_logits_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make the output head return float32 logits of hidden states and weights that are rounded to `dtype`.

    Raises:
        ConfigError: the head is not a plain linear layer.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ConfigError(
            f"strategy_config.fp32_lm_head: the output head of model_type '{model.config.model_type}' is a "
            f"{type(head).__name__}, not a linear layer; set false"
        )

    def logits(input: Tensor) -> Tensor:
        found = float32_logits(input, head.weight, dtype)
        return found if head.bias is None else found + head.bias.float()

    head.forward = logits


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


def predicting_rows(sequences: Sequences) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return (sample, response position) and the position in S that predicts it, each [N], of every response token.

    The tokens are in row order. An index by the mask would wait for the device every time it is used.
    """
    samples, columns = sequences.response_mask.nonzero(as_tuple=True)
    return (samples, columns), sequences.predicting_positions[samples, columns]


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
