"""Changes of a transformers model that every engine with such a model makes, and the rows that it predicts.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from roll_gspo.batch import Sequences
from roll_gspo.errors import ConfigError
from roll_gspo.strategies.head_products import float32_logits


def recompute_layers(model: PreTrainedModel, is_random: bool = False) -> None:
    """Keep only the inputs of every layer for the backward pass; the rest is computed again.

    `gradient_checkpointing_enable` of transformers needs the training mode, which switches dropout on.

    Args:
        model: the model.
        is_random: an adapter has dropout, so that the second computation needs the random state of the first.

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
        layer.forward = partial(_forward_of_layer, layer.forward, is_random)


def _forward_of_layer(forward: Callable[..., Any], is_random: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return recomputed(forward, *args, use_reentrant=False, preserve_rng_state=is_random, **kwargs)


def train_padding_token(model: PreTrainedModel) -> None:
    """Let the input embedding of `pad_token_id` receive gradients, as in other engines.

    torch drops them. The token may be part of the text: it ends turns of Phi-3 and documents of GLM-4.
    """
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None


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


def predicting_rows(sequences: Sequences) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return (sample, response position) and the position in S that predicts it, each [N], of every response token.

    The tokens are in row order. An index by the mask would wait for the device every time it is used.
    """
    samples, columns = sequences.response_mask.nonzero(as_tuple=True)
    return (samples, columns), sequences.predicting_positions[samples, columns]
