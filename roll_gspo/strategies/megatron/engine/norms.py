"""The norms of a layer: per position, over all heads of a projection, and behind a projection.

Legend: S positions of this rank, B samples, N heads of this rank, D head size, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from roll_gspo.strategies.megatron.engine.parallel import tensor_group


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm with megatron's constructor, marked so that sequence parallelism sums its gradient.

    A zero-centred norm (Gemma) multiplies by one plus its weight, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.zero_centered:
            return super().forward(input)
        weight = 1 + self.weight.float()
        return F.rms_norm(input.float(), self.normalized_shape, weight, self.eps).type_as(input)


class _ProjectionNorm(torch.nn.Module):
    """RMS norm over all heads of a projection (OLMo 2). Tensor-parallel ranks share the heads.

    Every rank has the whole weight and uses the part of its heads, because megatron sums the gradients of these norms
    over the tensor-parallel ranks.

    Args:
        config: megatron's description of the model.
        hidden_size: head size.
        eps: epsilon of the norm.
        heads: heads of the whole projection.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__()
        self.eps, self.size = eps, heads * hidden_size
        self.weight = Parameter(torch.ones(self.size, dtype=config.params_dtype))
        self.group = tensor_group()

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise [S, B, N, D]."""
        rows = heads.flatten(2).float()
        squares, weight = rows.square().sum(-1, keepdim=True), self.weight
        if self.group.size() > 1:  # the sum is of all ranks, and so is its gradient
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
            weight = weight.narrow(0, self.group.rank() * rows.shape[-1], rows.shape[-1])
        rows = rows * torch.rsqrt(squares / self.size + self.eps) * weight
        return rows.type_as(heads).view_as(heads)


class QueryNorm(_ProjectionNorm):
    """Norm over all query heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, config.num_attention_heads)


class KeyNorm(_ProjectionNorm):
    """Norm over all key heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, config.num_query_groups or config.num_attention_heads)


class OutputNorm:
    """Add a norm behind a row-parallel projection: `post_layernorm` of [S, B, H], before the residual is added."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)  # type: ignore[call-arg]
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the normalised output, and the bias that the caller adds."""
        output, bias = super().forward(*inputs)  # type: ignore[misc]
        return self.post_layernorm(output), bias


class NormedRowParallelLinear(OutputNorm, RowParallelLinear):
    """megatron's row-parallel projection with a norm behind it."""
