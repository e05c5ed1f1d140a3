"""A megatron-core GPTModel of a Hugging Face checkpoint, and its forward pass over response tokens.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from roll_gspo.batch import Sequences
from roll_gspo.config.strategy import MegatronConfig
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.strategies.base import ModelSetup, TokenScores
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.log_probs import place, score_in_micro_batches, token_log_probs
from roll_gspo.strategies.megatron.attention import HAVE_TE, decoder_spec
from roll_gspo.strategies.megatron.router_replay import Routers
from roll_gspo.strategies.megatron.weights import load_weights


def initialize_parallel(config: MegatronConfig, seed: int) -> None:
    """Make the process group and megatron's groups of this process, once; whoever made one before is respected.

    Raises:
        ConfigError: a layout that is not supported.
    """
    refuse_layout(config)
    if not dist.is_initialized():
        # a store in memory: a group of one process needs no port
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise ConfigError(f"megatron: {dist.get_world_size()} processes are not supported yet; start one")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        # megatron's tracker of parallel RNG states must exist; it also seeds torch, which is not ours to change
        state = torch.get_rng_state()
        model_parallel_cuda_manual_seed(seed)
        torch.set_rng_state(state)


def refuse_layout(config: MegatronConfig) -> None:
    """Refuse what is not supported or, worse, would train silently wrong.

    Raises:
        ConfigError: names every key.
    """
    problems = []
    for key, size in (
        ("tensor_model_parallel_size", config.tensor_model_parallel_size),
        ("pipeline_model_parallel_size", config.pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", config.virtual_pipeline_model_parallel_size or 1),
        ("context_parallel_size", config.context_parallel_size),
        ("expert_model_parallel_size", config.expert_model_parallel_size),
        ("expert_tensor_parallel_size", config.expert_tensor_parallel_size or 1),
    ):
        if size != 1:
            problems.append(f"strategy_config.{key}: {size} is not supported yet; set it to 1")
    if config.sequence_parallel:
        problems.append("strategy_config.sequence_parallel: needs tensor parallelism; set it to false")
    if config.moe_grouped_gemm and not (HAVE_TE and torch.cuda.is_available()):
        problems.append("strategy_config.moe_grouped_gemm: needs CUDA and TransformerEngine; set it to false")
    if problems:
        raise ConfigError("\n".join(problems))


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing: every parameter is read from the checkpoint."""
    return weight


def transformer_config(model: Architecture, dtype: torch.dtype, config: MegatronConfig) -> TransformerConfig:
    """megatron's description of the model and of how it is computed."""
    experts: dict[str, Any] = {}
    if model.experts is not None:
        experts = {
            "num_moe_experts": model.experts.num_experts,
            "moe_router_topk": model.experts.num_experts_per_token,
            "moe_ffn_hidden_size": model.experts.intermediate_size,
            # softmax over the chosen experts equals softmax over all, renormalised
            "moe_router_pre_softmax": not model.experts.normalize_top_k,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": config.moe_grouped_gemm,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=True,  # also marks how parameters are cut; the functions below do nothing
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # the loss functions return shares that are summed: nothing may be divided by the number of micro-batches
        calculate_per_token_loss=True,
        moe_token_dispatcher_type=config.moe_token_dispatcher_type,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        **experts,
    )


class _ResponseRows:
    """Lets the output layer see only the hidden states that predict response tokens.

    The layer's [S, B, H] input is replaced by the [N, 1, H] rows of the current micro-batch, so logits of prompts
    and padding are never computed.
    """

    def __init__(self, output_layer: torch.nn.Module) -> None:
        self.index: tuple[Tensor, Tensor] | None = None
        output_layer.register_forward_pre_hook(self._select)

    def _select(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        if self.index is None:
            raise RuntimeError("the output layer ran outside ResponseModel.forward")
        return (hidden[self.index].unsqueeze(1), *rest)


@dataclass
class ResponseModel:
    """A loaded GPTModel and the pass that scores response tokens.

    Attributes:
        gpt: the model, on `device`.
        wrapped: what megatron's schedule runs: `gpt`, or the data-parallel wrapper around it.
        architecture: of the checkpoint.
        setup: what it was made from.
        device: where it computes.
        routers: of a mixture of experts whose choices `score` records; None where nothing is recorded.
    """

    gpt: GPTModel
    wrapped: torch.nn.Module
    architecture: Architecture
    setup: ModelSetup
    device: torch.device
    routers: Routers | None = None

    def __post_init__(self) -> None:
        self._rows = _ResponseRows(self.gpt.output_layer)

    def logits(self, sequences: Sequences) -> Tensor:
        """[N, V] logits of the positions that predict response tokens, in row order."""
        mask = sequences.response_mask
        samples = torch.arange(len(sequences), device=mask.device)[:, None].expand_as(mask)[mask]
        self._rows.index = (sequences.predicting_positions[mask], samples)
        try:
            # rotary positions are counted by megatron; the attention is causal and padding lies to the right
            return self.wrapped(sequences.input_ids, None, None)[0]
        finally:
            self._rows.index = None

    def scores(self, logits: Tensor, sequences: Sequences, entropy: bool) -> TokenScores:
        """Log-probabilities (and entropies) [B, T] from the output of `logits`; differentiable."""
        mask = sequences.response_mask
        log_probs, entropies = token_log_probs(
            logits, sequences.response_ids[mask], self.setup.temperature, entropy, self.architecture.vocab_size
        )
        return TokenScores(place(log_probs, mask), None if entropies is None else place(entropies, mask))

    def chosen_experts(self, sequences: Sequences) -> Tensor | None:
        """[B, S, L, K] int16 of the pass over `sequences` that was just made, -1 on padding; None: not recorded."""
        if self.routers is None:
            return None
        chosen = self.routers.chosen(*sequences.input_ids.shape)
        return chosen.masked_fill(~sequences.attention_mask[:, :, None, None], -1)

    @torch.no_grad()
    def score(self, sequences: Sequences, entropy: bool) -> TokenScores:
        """Score all samples in micro-batches through megatron's schedule; result on the CPU."""
        self.wrapped.eval()
        if self.routers is not None:
            self.routers.prescribe(None)
        forward = functools.partial(self._score_micro_batch, entropy=entropy)
        return score_in_micro_batches(sequences, self.setup.micro_batch_size, forward)

    def _score_micro_batch(self, sequences: Sequences, entropy: bool) -> TokenScores:
        sequences = move(sequences, self.device)

        def step(_: Iterator[Any], __: Any) -> tuple[Tensor, Callable[..., TokenScores]]:
            def scores(logits: Tensor, non_loss_data: bool = True) -> TokenScores:
                found = self.scores(logits, sequences, entropy)
                return found._replace(routed_experts=self.chosen_experts(sequences))

            return self.logits(sequences), scores

        (result,) = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(()),
            model=[self.wrapped],
            num_microbatches=1,
            seq_length=sequences.input_ids.shape[1],
            micro_batch_size=len(sequences),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return result


def build_model(setup: ModelSetup, config: MegatronConfig) -> ResponseModel:
    """Build the model of `setup.checkpoint` on the local device and load its weights.

    Raises:
        ConfigError: a layout or a model that is not supported.
        CheckpointError: weights are missing or do not fit.
    """
    if setup.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"megatron: dtype {setup.dtype} is not supported; use float32 or bfloat16")
    architecture = Architecture.from_checkpoint(setup.checkpoint)
    initialize_parallel(config, setup.seed)
    megatron_config = transformer_config(architecture, setup.dtype, config)
    gpt = GPTModel(
        megatron_config,
        decoder_spec(megatron_config),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,  # type: ignore[arg-type]
    )
    device = local_device()
    gpt.to(device)
    load_weights(gpt, CheckpointReader(setup.checkpoint), architecture)
    return ResponseModel(gpt, gpt, architecture, setup, device)
