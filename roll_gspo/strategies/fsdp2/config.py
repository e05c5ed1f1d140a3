"""The options of the FSDP2 engine, and the model families whose samples it can pack (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from roll_gspo.config.base import Problem, Schema

# `model_type` of families whose packed samples give the log-probs of padded ones, by test. Their attention has no
# soft cap, sink or state that crosses samples.
PACKED_FAMILIES = (
    *("cohere", "cohere2", "deepseek_v3", "gemma", "gemma3_text", "glm", "glm4", "granite", "llama", "mistral"),
    *("mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)
# Families whose logits are the product of hidden states and output layer, without a scale or a soft cap after it. Their
# log-probs are computed block by block.
PLAIN_HEADS = tuple(name for name in PACKED_FAMILIES if name not in ("cohere", "cohere2", "granite"))


class Fsdp2Config(Schema):
    """`strategy_config` of `fsdp2_train` and `fsdp2_infer`: a transformers model, sharded over the ranks of a role."""

    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the transformers model for padded samples."""
    use_sequence_packing: bool | None = None
    """Lay the samples of a micro-batch one after the other, without padding. null: on GPUs, if the model's family can
    be packed. Results do not change."""
    gradient_checkpointing: bool = False
    """Recompute the activations of every layer in the backward pass instead of keeping them; `fsdp2_train` only."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a layer after its forward pass and gather them again for the backward pass.
    false: keep them, which saves communication; `fsdp2_train` only."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and copy each layer to the GPU while it computes.
    The optimizer steps on the CPU; `fsdp2_train` only."""
    grad_reduce_in_fp32: bool = True
    """Reduce gradients in float32; false: in the dtype of the model. `fsdp2_train` only."""
    fp32_lm_head: bool | None = None
    """Compute logits in float32 from 16-bit hidden states and weights; null: on if `dtype` has 16 bits."""
    fused_head: Literal["auto", "torch", "triton"] = "auto"
    """Kernel of log-probs and entropies, in families whose logits are a plain product; auto: `triton` for 16 bits on a
    GPU if it is installed, else `torch`."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield settings that are invalid for every model."""
        yield from super().broken_rules()
        if self.use_sequence_packing and self.attn_implementation != "sdpa":
            message = f"{self.attn_implementation} is not used: packed samples have their own kernel; remove it"
            yield Problem("attn_implementation", message, ("use_sequence_packing",))
