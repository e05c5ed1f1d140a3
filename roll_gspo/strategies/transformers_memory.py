"""Memory of the passes of a transformers model (no torch).

The counts are those of the decoders of transformers, which compute norms in float32 and fuse nothing. Training in 16
bits runs under autocast or with 16-bit parameters. Under autocast the residual stream is float32, every projection
casts its input, and a 16-bit copy of every matrix exists.

Legend: H hidden, V vocabulary, N query heads, K key/value heads, D head size, F columns of a feed-forward layer.
"""

from __future__ import annotations

from roll_gspo.config.memory import PassBytes, PassSize
from roll_gspo.models.architecture import Architecture

_LOGITS = 3  # logits, the rows of response tokens, and the gradient of either


def pass_bytes(
    model: Architecture,
    size: PassSize,
    itemsize: int,
    *,
    train: bool,
    head: bool,
    recompute: bool,
    autocast: bool,
) -> PassBytes:
    """Return the memory of the passes of a micro-batch.

    Args:
        model: the model.
        size: the largest micro-batch.
        itemsize: bytes of an activation.
        train: whether a backward pass follows.
        head: whether log-probs are computed; a value head needs no memory.
        recompute: whether the backward pass computes the activations of each layer again.
        autocast: whether training in 16 bits runs under autocast.
    """
    layer = size.positions * layer_bytes_per_position(model, itemsize, autocast=autocast)
    logits = _LOGITS * size.predicted * model.vocab_size * itemsize if head else 0.0
    if not train:
        return PassBytes(layer, logits)
    copies = itemsize * _matrix_parameters(model) if autocast and itemsize < 4 else 0.0
    kept = model.num_layers * layer
    if recompute:  # the input of every layer, and all of one layer that is computed again
        entry = 4 if autocast else itemsize
        kept = model.num_layers * size.positions * model.hidden_size * entry + layer
    return PassBytes(kept + layer + copies, logits)


def layer_bytes_per_position(model: Architecture, itemsize: int, *, autocast: bool) -> float:
    """Return the bytes per position that a layer keeps for the backward pass."""
    heads, groups = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norms = model.family.norms.num_before + model.family.norms.num_after
    if itemsize == 4:
        # Input and normalised input of every norm, and inputs of attention and feed-forward layer
        numbers = (2 * norms + 2) * model.hidden_size + (4 if model.qk_norm else 2) * (heads + groups)
        return 4 * (numbers + _feed_forward_numbers(model))
    # Every norm keeps four bytes twice: input and normalised input in float32; or with 16-bit parameters the input in
    # float32, the normalised input and the output. Under autocast every projection casts its input.
    inputs = 2 * 4 * norms
    if autocast:
        inputs += 2 * (3 + (2 if model.experts is None else 1))
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
