"""Estimated floating-point operations of a forward pass over a sample."""

from __future__ import annotations

from dataclasses import dataclass

from roll_gspo.models.architecture import Architecture


@dataclass(frozen=True)
class PassCost:
    """Operations of a forward pass over a sample of n tokens, of which r are predicted.

    They are `per_token * n + per_pair * n**2 + per_windowed_pair * m * (2 * n - m) + per_prediction * r`, with m the
    smaller of n and the window. All terms are integers, so that every rank computes the same.

    Attributes:
        per_token: matrices of the layers.
        per_pair: causal attention of layers without a window.
        per_prediction: output head.
        per_windowed_pair: attention of layers with a sliding window.
        window: tokens that a token sees in these layers; None if there are none.
    """

    per_token: int = 1
    per_pair: int = 0
    per_prediction: int = 0
    per_windowed_pair: int = 0
    window: int | None = None

    @staticmethod
    def of(model: Architecture) -> PassCost:
        """Estimate the cost of a model."""
        hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
        layer = hidden * (2 * width + 2 * model.num_key_value_heads * model.head_dim)
        if model.experts is None:
            layer += 3 * hidden * model.intermediate_size
        else:
            layer += 3 * hidden * model.experts.intermediate_size * model.experts.num_experts_per_token
            layer += hidden * model.experts.num_experts
        # A multiplication and an addition per weight. Attention multiplies twice and sees half of the pairs.
        layers, windowed = model.num_layers, sum(size is not None for size in model.windows)
        pairs, windowed_pairs = 2 * (layers - windowed) * width, 2 * windowed * width
        return PassCost(2 * layers * layer, pairs, 2 * hidden * model.vocab_size, windowed_pairs, model.window)
