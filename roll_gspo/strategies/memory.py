"""Memory of passes through a decoder: parts of the estimates of all engines (no torch).

Legend: H hidden, V vocabulary, N query heads, K key/value heads, D head size, F columns of a feed-forward layer.
"""

from __future__ import annotations

from roll_gspo.models.architecture import Architecture

# `scores_from_hidden` computes the logits of the vocabulary block by block, of this many float32 numbers on a GPU.
BLOCK_LOGITS = 2**24
_BLOCKS = 3  # logits, exponentials, and the copy in the dtype of the head


def head_bytes(model: Architecture, predicted: int, itemsize: int, *, shards: int, train: bool) -> float:
    """Return the bytes of the blockwise output head.

    Args:
        model: the model.
        predicted: tokens whose logits are computed.
        itemsize: bytes of a number of the head.
        shards: ranks that share the rows of the head.
        train: whether the backward pass follows.
    """
    rows = -(-model.vocab_size // shards)
    block = 4 * _BLOCKS * min(BLOCK_LOGITS, predicted * rows)
    hidden = predicted * model.hidden_size
    if not train:
        return block + hidden * itemsize
    return block + rows * model.hidden_size * itemsize + hidden * (4 + 2 * itemsize)


def kv_bytes_per_token(model: Architecture, itemsize: int, shards: int = 1) -> float:
    """Return the bytes of the keys and values of one token on one of `shards` devices.

    A key/value head is on at least one device.
    """
    heads = max(model.num_key_value_heads / shards, 1)
    return 2 * model.num_layers * heads * model.head_dim * itemsize
