"""The options of the transformers engine."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from roll_gspo.config.base import Schema


class HfConfig(Schema):
    """`strategy_config` of `hf_train` and `hf_infer`: plain transformers and torch."""

    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the transformers model."""
    gradient_checkpointing: bool = False
    """Recompute the activations of every layer in the backward pass instead of keeping them; `hf_train` only."""
    generate_batch_size: PositiveInt = 256
    """Samples that are decoded together when this engine generates."""
    fp32_lm_head: bool | None = None
    """Compute logits in float32 from 16-bit hidden states and weights; null: on if `dtype` has 16 bits."""
