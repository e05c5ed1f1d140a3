"""Memory of the passes of a megatron-core rank (no torch).

The count of saved tensors follows Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198), sections 4.1 to 4.2.3, adapted: attention never materialises its scores (FlashAttention),
heads of keys and values are shared by groups of queries (GQA), the feed-forward layer is a SwiGLU or a mixture of
experts, and there is no dropout. A norm keeps its input only, as its kernel on GPUs does.

Legend: H hidden, N query heads, K key/value heads, D head size, F columns of a feed-forward layer or an expert.
"""

from __future__ import annotations

from roll_gspo.config.memory import PassBytes, PassSize
from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.memory import head_bytes

# Columns that a SwiGLU keeps in units of F: gate and linear half (2), and their product. Without fusion also the
# activated gate, and the linear half plus its offset.
_FUSED_SWIGLU, _SWIGLU = 3, 5


def pass_bytes(
    model: Architecture, config: MegatronConfig, stage: int, size: PassSize, itemsize: int, *, train: bool, head: bool
) -> PassBytes:
    """Return the memory of the passes of a rank of a pipeline stage.

    Mixtures of experts are assumed to be balanced.

    Args:
        model: the whole model.
        config: its layout.
        stage: number of the stage, from 0.
        size: the largest micro-batch.
        itemsize: bytes of an activation.
        train: whether a backward pass follows.
        head: whether the last stage computes log-probs; a value head needs no memory.
    """
    positions = -(-size.positions // config.context_parallel_size)
    pipeline = config.pipeline_model_parallel_size
    working = _working_numbers(model, config) * positions * itemsize
    kept = kept_bytes(model, config, stage, size, itemsize) if train else 0.0
    logits = 0.0
    if head and stage == pipeline - 1:
        logits = head_bytes(model, size.predicted, itemsize, shards=config.tensor_model_parallel_size, train=train)
    return PassBytes(kept + working, logits)


def kept_bytes(model: Architecture, config: MegatronConfig, stage: int, size: PassSize, itemsize: int) -> float:
    """Return the bytes of the tensors that are kept for the backward pass, of all layers of a stage."""
    positions = -(-size.positions // config.context_parallel_size)
    layers = model.num_layers // config.pipeline_model_parallel_size
    layer = positions * (_layer_numbers(model, config) * itemsize + 4 * _statistics(model, config))
    entry = positions * model.hidden_size / _sequence_shards(config) * itemsize
    in_flight = _in_flight(config, stage, size.micro_batches)
    is_last = stage == config.pipeline_model_parallel_size - 1
    norm = 2 * entry if is_last else 0.0  # input and output of the final norm
    if config.recompute_granularity != "full":
        return in_flight * layers * layer + norm
    chosen = config.recompute_num_layers or 1
    if config.recompute_method == "block":
        recomputed = min(chosen, layers)
        # If layers follow that are not recomputed, their activations are freed before the first is computed again.
        again = layer if recomputed == layers else 0.0
        return in_flight * (recomputed * entry + (layers - recomputed) * layer) + max(again, norm)
    units = -(-layers // chosen)
    return in_flight * units * entry + max(chosen * layer, norm)


def _in_flight(config: MegatronConfig, stage: int, micro_batches: int) -> float:
    """Return the micro-batches whose activations a stage keeps at once (section 4.2.3 of the paper)."""
    pipeline, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    waiting = pipeline - stage + ((pipeline - 1) / virtual if virtual else 0)
    return min(waiting, micro_batches)


def _sequence_shards(config: MegatronConfig) -> int:
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def _layer_numbers(model: Architecture, config: MegatronConfig) -> float:
    """Return the numbers that a layer keeps per position for the backward pass."""
    # inputs of the norms, and inputs of the projections: outputs of the norms in front of them, or the residual stream
    norms = model.family.norms
    hidden = (2 + norms.num_before + norms.num_after) * model.hidden_size / _sequence_shards(config)
    rotary = 0
    if config.use_sequence_packing and not config.apply_rope_fusion:
        rotary = 4 * model.head_dim  # cosines and sines per token, of queries and of keys; padded samples share them
    return hidden + rotary + _attention_numbers(model, config) + _feed_forward_numbers(model, config)


def _attention_numbers(model: Architecture, config: MegatronConfig) -> float:
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    numbers = heads + 2 * groups  # the projection of queries, keys and values; attention keeps the values
    if model.family.qk_norm == "head" and heads > groups > config.tensor_model_parallel_size:
        numbers += heads  # queries are interleaved with keys and values; their norm keeps a contiguous copy
    numbers += heads + groups  # rotated queries and keys
    numbers += heads  # the output, which is the input of the output projection
    return numbers * model.head_dim / config.tensor_model_parallel_size


def _feed_forward_numbers(model: Architecture, config: MegatronConfig) -> float:
    if model.experts is None:
        return _columns(model, config) * model.intermediate_size / config.tensor_model_parallel_size
    # A balanced rank gets as many tokens as it sends: those of its share of the sequence, of all its tensor ranks.
    tokens = model.experts.num_experts_per_token * config.expert_tensor_size / _sequence_shards(config)
    unweighted = 1 if config.bias_activation_fusion is False else 0  # the product before the router's weight
    columns = (_columns(model, config) + unweighted) * model.experts.intermediate_size / config.expert_tensor_size
    return tokens * (model.hidden_size + columns)


def _columns(model: Architecture, config: MegatronConfig) -> int:
    """Return the columns that a gated layer keeps; null of `bias_activation_fusion` is on for SwiGLU on GPUs."""
    fused = model.family.activation == "silu" and config.bias_activation_fusion is not False
    return _FUSED_SWIGLU if fused else _SWIGLU


def _statistics(model: Architecture, config: MegatronConfig) -> float:
    """Return the float32 numbers per position: scales of norms, logarithms of sums of attention, and wide inputs."""
    heads = model.num_attention_heads / config.tensor_model_parallel_size
    of_both = heads + model.num_key_value_heads / config.tensor_model_parallel_size
    # A norm over all heads keeps the projection before and after the division, in float32.
    of_heads = {None: 0.0, "head": of_both, "projection": 2 + 2 * of_both * model.head_dim}[model.family.qk_norm]
    norms = model.family.norms.num_before + model.family.norms.num_after
    # A zero-centred norm keeps its input in float32: two bytes more than the bfloat16 input that is counted already.
    wider = 0.5 * (norms * model.hidden_size / _sequence_shards(config) + of_both * model.head_dim)
    return norms / _sequence_shards(config) + heads + of_heads + (wider if model.family.zero_centered_norms else 0)


def _working_numbers(model: Architecture, config: MegatronConfig) -> float:
    """Return the numbers per position that a layer computes with: the residual stream, a norm, and its larger half."""
    half = max(_attention_numbers(model, config), _feed_forward_numbers(model, config))
    return 2 * model.hidden_size + half
