"""A transformers model whose parameters are sharded over all ranks, and its passes over samples.

Legend: B samples, T response positions, N response tokens of a micro-batch, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from roll_gspo.batch import Sequences
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.models.pass_cost import PassCost
from roll_gspo.rendezvous import group_backend
from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.checkpoint_names import CheckpointNames
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.fsdp2.config import PLAIN_HEADS, Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.attention import use_packed_attention
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput, model_input
from roll_gspo.strategies.fsdp2.engine.weights import load_shards, stored_shapes
from roll_gspo.strategies.gathering import gather_samples
from roll_gspo.strategies.head_products import uses_float32
from roll_gspo.strategies.lora import Adapter
from roll_gspo.strategies.micro_batches import cost_of_pass, costs_of, share_of_rank, split_samples
from roll_gspo.strategies.transformers_model import (
    compute_logits_in_float32,
    recompute_layers,
    train_padding_token,
)
from roll_gspo.strategies.value_head import ValueHead


class ValueModel(Module):
    """The trunk of a transformers model with a value head instead of logits.

    Args:
        model: a causal language model. Its trunk keeps the names of its parameters.
        hidden_size: size of the hidden states.
    """

    def __init__(self, model: PreTrainedModel, hidden_size: int) -> None:
        super().__init__()
        self._prefix = model.base_model_prefix
        self.add_module(self._prefix, model.base_model)
        with torch.device("meta"):
            self.head = ValueHead(hidden_size)

    def forward(self, logits_to_keep: Tensor, **arguments: Any) -> Tensor:
        """Return [B, K, 1] values at the positions `logits_to_keep` [K]."""
        return self.head(self.get_submodule(self._prefix)(**arguments).last_hidden_state[:, logits_to_keep])


@dataclass
class ShardedModel:
    """This rank's part of a loaded model.

    Attributes:
        module: the sharded root: a causal language model, or a `ValueModel`.
        names: names of the parameters in checkpoints, except a value head's.
        setup: settings of the model.
        config: options of the engine.
        device: device of the computation.
        pass_cost: cost of a pass, which the ranks share evenly.
        adapter: the adapter that is trained; None if all parameters are, or none.
        head: the output layer if the model returns its input in place of logits; None if it returns logits.
    """

    module: Any
    names: CheckpointNames
    setup: ModelSetup
    config: Fsdp2Config
    device: torch.device
    pass_cost: PassCost
    adapter: Adapter | None = None
    head: Module | None = None

    def share(self, parts: Sequence[Any], samples_of: Callable[[Any], tuple[Sequences, Tensor | None]]) -> list[Any]:
        """Select the micro-batches of this rank; None marks a dummy pass, as all ranks gather layers together.

        Args:
            parts: micro-batches of all ranks.
            samples_of: returns the sequences of a micro-batch, and the index of its samples in them (None for all).
        """
        ranks = dist.get_world_size()
        costs = None
        if ranks > 1:
            packed, cost = bool(self.config.use_sequence_packing), self.pass_cost
            costs = [cost_of_pass(sequences, cost, packed, index) for sequences, index in map(samples_of, parts)]
        return share_of_rank(parts, dist.get_rank(), ranks, costs=costs)

    def outputs(self, sequences: Sequences) -> tuple[Tensor, ModelInput]:
        """Return the outputs that predict the response tokens, and where these lie; differentiable.

        They are hidden states [N, H] if `head` is set, else logits [N, V] or values [N, 1].

        Args:
            sequences: the samples, on the CPU.
        """
        given = model_input(sequences, packed=bool(self.config.use_sequence_packing)).to(self.device)
        found = self.module(**given.arguments())
        found = found if isinstance(found, Tensor) else found.logits
        return found[given.rows], given

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Run passes in this context. After it, every parameter is sharded; some are not after a forward pass."""
        try:
            yield
        finally:
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    @torch.no_grad()
    def over_samples(self, sequences: Sequences, read: Callable[[Tensor, ModelInput], list[Tensor]]) -> list[Tensor]:
        """Compute results of every sample without gradient, put together on the CPU of every rank.

        Args:
            sequences: all samples, on the CPU.
            read: returns results [b, t] from the outputs of a micro-batch, 0 where masked.

        Returns:
            Results [B, T] in the given order.
        """
        ranks, packed = dist.get_world_size(), bool(self.config.use_sequence_packing)
        costs = costs_of(sequences, self.pass_cost) if ranks > 1 else None
        size, budget = self.setup.micro_batch_size, self.setup.max_tokens
        parts = split_samples(sequences.lengths, size, budget, packed, ranks=ranks, costs=costs)
        mine = self.share(parts, lambda index: (sequences, index))
        nothing = torch.zeros(1, dtype=torch.int64)
        found: list[tuple[Tensor, list[Tensor]]] = []
        with self.gathered():
            for index in mine:
                results = read(*self.outputs(sequences.rows(nothing if index is None else index)))
                if index is not None:
                    found.append((index, results))
        return gather_samples(found, sequences, self.device)


def build_sharded(setup: ModelSetup, config: Fsdp2Config, *, trained: bool, value_head: bool = False) -> ShardedModel:
    """Build the model of `setup.checkpoint` with this rank's part of its weights.

    The model is built without memory for its parameters, sharded, and filled from the checkpoint. No rank ever holds
    all weights.

    Args:
        setup: settings of the model.
        config: options of the engine.
        trained: parameters are float32 and have gradients; else they have the setup's dtype. If `setup.lora` is set,
            this is so for an adapter, and the other parameters are frozen.
        value_head: replace the output layer by a `ValueHead`.

    Raises:
        ConfigError: the model or its dtype is not supported, or weights are missing.
        CheckpointError: the weights cannot be read.
    """
    if setup.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"fsdp2: dtype {setup.dtype} is not supported; use float32 or bfloat16")
    device = local_device()
    mesh = _mesh(device)
    lora = setup.lora if trained else None
    model = _without_memory(setup, config, torch.float32 if trained and lora is None else setup.dtype)
    reader = CheckpointReader(setup.checkpoint)
    names = CheckpointNames(model, stored_shapes(reader))
    module: Module = model
    fresh: dict[str, Tensor] = {}
    head, adapter = _head_of_rows(model), None
    if value_head:
        head, hidden_size = None, model.config.get_text_config().hidden_size
        module = ValueModel(model, hidden_size)
        fresh = {"head.weight": torch.zeros(1, hidden_size)}
    elif head is not None:
        head.forward = _return_input
    elif uses_float32(setup.dtype, config.fp32_lm_head):
        compute_logits_in_float32(model, setup.dtype)
    module.requires_grad_(trained)
    if lora is not None:
        adapter = Adapter(model, lora, setup.seed, names)
        fresh = dict(adapter.initial_values())
    _shard(module, mesh, setup.dtype, config, trained)
    load_shards(module, names, reader, torch.device("cpu") if config.cpu_offload else device, fresh)
    cost = PassCost()
    with suppress(ConfigError):  # an architecture whose operations are not known: balance tokens
        cost = PassCost.of(Architecture.from_checkpoint(setup.checkpoint))
    return ShardedModel(module, names, setup, config, device, cost, adapter, head)


def _head_of_rows(model: PreTrainedModel) -> Module | None:
    """Return the output layer if logits are its plain product with hidden states; else None."""
    head: Any = model.get_output_embeddings()
    is_plain = type(head) is torch.nn.Linear and head.bias is None and model.config.model_type in PLAIN_HEADS
    return head if is_plain else None


def _return_input(hidden: Tensor) -> Tensor:
    return hidden


def _mesh(device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks, on the default process group (a world of one if there is none)."""
    if not dist.is_initialized():
        # a store in memory: a group of one process needs no port
        dist.init_process_group(group_backend(), store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _without_memory(setup: ModelSetup, config: Fsdp2Config, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device; its buffers have values. Dropout is off."""
    try:
        of_checkpoint = AutoConfig.from_pretrained(setup.checkpoint)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                of_checkpoint, dtype=dtype, attn_implementation=config.attn_implementation
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # arbitrary exceptions of model code
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{setup.checkpoint}: transformers cannot build it ({reason[:300]}); repair the folder"
        raise ConfigError(message) from error
    train_padding_token(model)
    if config.use_sequence_packing:
        use_packed_attention(model)
    if config.gradient_checkpointing:
        recompute_layers(model, is_random=setup.lora is not None and setup.lora.dropout > 0)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device when its module gets it, so that at most one has memory."""
    register = Module.register_parameter

    def register_on_meta(module: Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            on_meta = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = on_meta

    Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        Module.register_parameter = register  # type: ignore[method-assign]


def _shard(module: Module, mesh: DeviceMesh, dtype: torch.dtype, config: Fsdp2Config, trained: bool) -> None:
    """Shard every layer as a unit, then the rest (embeddings, last norm, output layer). Gradients are summed."""
    precision = MixedPrecisionPolicy()
    if trained and dtype != torch.float32:
        precision = MixedPrecisionPolicy(dtype, torch.float32 if config.grad_reduce_in_fp32 else dtype)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    common: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    if isinstance(module, ValueModel):
        fully_shard(module.head, **common)  # in float32, see `ValueHead`
    for layer in [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, mp_policy=precision, reshard_after_forward=config.reshard_after_forward, **common)
    fully_shard(module, mp_policy=precision, **common)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    if isinstance(module, FSDPModule):
        # an expert that no token of a rank chooses has no gradient there, but the other ranks wait for it
        module.set_reduce_scatter_unused_params(True)
