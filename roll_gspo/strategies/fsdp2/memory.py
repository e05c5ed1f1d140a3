"""Memory of whole parameters and gradients that exist on a rank for a while (no torch).

Each layer is a unit of FSDP. The rest, i.e. embeddings, last norm and output layer, is the unit of the root.
"""

from __future__ import annotations

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.fsdp2.config import Fsdp2Config


def gathered_bytes(
    model: Architecture, num_parameters: float, config: Fsdp2Config, itemsize: int, *, train: bool
) -> float:
    """Return the largest sum of the bytes of gathered parameters and of gradients that are not split yet.

    Args:
        model: the model.
        num_parameters: number of its parameters.
        config: options of the engine.
        itemsize: bytes of a number in a pass.
        train: whether a backward pass follows.
    """
    vocabulary = model.vocab_size * model.hidden_size
    root = vocabulary * (1 if model.tie_word_embeddings else 2)
    layer = (num_parameters - root) / model.num_layers
    # While the first layer is gathered, the root has its parameters and the buffer that they were gathered into.
    forward = itemsize * max(2 * root + layer, root + 2 * layer)
    if not config.reshard_after_forward:
        forward = max(forward, itemsize * (num_parameters + layer))
    if not train:
        return forward
    reduced = 4 if config.grad_reduce_in_fp32 else itemsize
    # Backward through a layer: its parameters and gradients, the next layer's parameters, and the buffer that is
    # reduced. The root keeps its parameters and the gradient of the output layer.
    layers = (itemsize * 2 + itemsize + reduced) * layer
    if not config.reshard_after_forward:
        layers = itemsize * (num_parameters - root) + (itemsize + reduced) * layer
    backward = itemsize * (root + vocabulary) + layers
    # At the end: the root's parameters and the gradients of both uses of the vocabulary, then the buffer instead.
    end = max(itemsize * (root + 2 * vocabulary), (itemsize + reduced) * root)
    return max(forward, backward, end)
