"""Memory of the passes of a transformers model (no torch).

The counts are those of the decoders of transformers, which compute norms in float32 and fuse nothing. With `bf16` the
trainer's passes run under autocast: the residual stream is float32, every projection casts its input, and a bfloat16
copy of every matrix exists.

Legend: H hidden, V vocabulary, N query heads, K key/value heads, D head size, F columns of a feed-forward layer.
"""

from __future__ import annotations

from roll_gspo.config.memory import PassBytes, PassSize
from roll_gspo.models.architecture import Architecture

_LOGITS = 3  # logits, the rows of response tokens, and the gradient of either


def pass_bytes(
    model: Architecture, size: PassSize, itemsize: int, *, train: bool, head: bool, recompute: bool
) -> PassBytes:
    """Return the memory of the passes of a micro-batch.

    Args:
        model: the model.
        size: the largest micro-batch.
        itemsize: bytes of an activation: 2 is autocast if `train`.
        train: whether a backward pass follows.
        head: whether log-probs are computed; a value head needs no memory.
        recompute: whether the backward pass computes the activations of each layer again.
    """
    layer = size.positions * layer_bytes_per_position(model, itemsize)
    logits = _LOGITS * size.predicted * model.vocab_size * itemsize if head else 0.0
    if not train:
        return PassBytes(layer, logits)
    copies = 0.0 if itemsize == 4 else itemsize * _matrix_parameters(model)
    kept = model.num_layers * layer
    if recompute:  # the float32 input of every layer, and all of one layer that is computed again
        kept = model.num_layers * size.positions * model.hidden_size * 4 + layer
    return PassBytes(kept + layer + copies, logits)


def layer_bytes_per_position(model: Architecture, itemsize: int) -> float:
    """Return the bytes per position that a layer keeps for the backward pass."""
    heads, groups = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if itemsize == 4:
        # Input, normalised input and output of both norms
        numbers = 6 * model.hidden_size + (4 if model.qk_norm else 2) * (heads + groups)
        return 4 * (numbers + _feed_forward_numbers(model))
    # Input and normalised input of both norms in float32; every projection casts its input
    inputs = 4 * 4 + 2 * (3 + (2 if model.experts is None else 1))
    attention = 10 if model.qk_norm else 4
    return inputs * model.hidden_size + attention * (heads + groups) + 2 * _feed_forward_numbers(model)


def _feed_forward_numbers(model: Architecture) -> float:
    if model.experts is None:
        return 4 * model.intermediate_size  # gate, activated gate, the other half, and their product
    experts = model.experts
    return experts.num_experts_per_token * (2 * model.hidden_size + 4 * experts.intermediate_size)


def _matrix_parameters(model: Architecture) -> float:
    """Return the parameters of all matrices of the layers and of the head."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    if model.experts is None:
        feed_forward = 3 * model.hidden_size * model.intermediate_size
    else:
        feed_forward = 3 * model.hidden_size * model.experts.intermediate_size * model.experts.num_experts
    return model.num_layers * (attention + feed_forward) + model.vocab_size * model.hidden_size
