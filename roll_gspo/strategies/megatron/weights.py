"""Weights of a GPTModel: read from a Hugging Face checkpoint, and seen under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from roll_gspo.errors import CheckpointError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.models.weight_mapping import recipe

# in some checkpoints, and recomputed here
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


@torch.no_grad()
def load_weights(gpt: GPTModel, reader: CheckpointReader, architecture: Architecture) -> None:
    """Fill every parameter, one tensor at a time.

    Raises:
        CheckpointError: a weight is missing, has another shape, or is of no use to this model.
    """
    for name, parameter in gpt.named_parameters():
        made_of = recipe(name)
        tensors = [reader.read(hf_name) for hf_name in made_of.hf_names]
        packed = made_of.pack(tensors, architecture, gpt.vocab_size)
        rows_fit = made_of.packing != "vocab" or tensors[0].shape[0] == architecture.vocab_size
        if packed.numel() != parameter.numel() or not rows_fit:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise CheckpointError(
                f"{reader.folder}: {', '.join(made_of.hf_names)} of shapes {shapes} do not fill '{name}' "
                f"{tuple(parameter.shape)}; config.json and the weights do not agree"
            )
        parameter.copy_(packed.reshape(parameter.shape))
    unused = {name for name in reader.unread if not name.endswith(_NOT_WEIGHTS)}
    if architecture.tie_word_embeddings:
        unused.discard("lm_head.weight")
    if unused:
        raise CheckpointError(
            f"{reader.folder}: {len(unused)} tensors have no place in the model, e.g. '{min(unused)}'; "
            "the model would compute something else than this checkpoint"
        )


class MegatronWeights:
    """The live weights of a model under checkpoint names (see `WeightSource`); views where packing allows."""

    def __init__(self, gpt: GPTModel, architecture: Architecture) -> None:
        self._gpt = gpt
        self._architecture = architecture

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._gpt.named_parameters():
            made_of = recipe(name)
            tensors = made_of.unpack(parameter.detach(), self._architecture)
            yield from zip(made_of.hf_names, tensors, strict=True)
