"""A megatron-core GPTModel of a Hugging Face checkpoint, and its passes over samples.

Legend: B samples, S positions, T response positions, N response tokens of a micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.models.pass_cost import PassCost
from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.gathering import gather_samples
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.attention import decoder_spec, uses_transformer_engine
from roll_gspo.strategies.megatron.engine.packed_layout import PackedLayout, pack
from roll_gspo.strategies.megatron.engine.parallel import initialize_parallel
from roll_gspo.strategies.megatron.engine.rotary import layer_rotary
from roll_gspo.strategies.megatron.engine.transformer import refuse_layout, transformer_config
from roll_gspo.strategies.megatron.engine.weights import load_weights
from roll_gspo.strategies.micro_batches import cost_of_pass, costs_of, share_of_rank, split_samples


class MicroBatch(NamedTuple):
    """A micro-batch on the model's device, and its layout there.

    `batch` is None in a dummy pass: ranks that share communication must run the same number of passes.
    """

    sequences: Sequences
    packed_layout: PackedLayout
    batch: TrainBatch | None


# (hidden states [N, H] that predict response tokens, the micro-batch) -> result of the pass
Reader = Callable[[Tensor, MicroBatch], Any]


class _ResponseRows:
    """Make a model return the hidden states that predict response tokens, [1, N, H], instead of logits.

    Logits of prompts and padding are never computed. The reader of the rows computes those of responses.

    Args:
        gpt: a last pipeline stage.
        partial: each tensor-parallel rank uses its part of the head, so gradients of the rows are summed.
    """

    def __init__(self, gpt: GPTModel, partial: bool) -> None:
        self.rows: tuple[Tensor, Tensor] | None = None
        self._sequence_parallel, self._partial = gpt.config.sequence_parallel, partial
        gpt.output_layer.forward = self._select  # type: ignore[method-assign]

    def _select(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        if self.rows is None:
            raise RuntimeError("the output layer ran outside ResponseModel.run")
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=self._partial)
        rows = hidden[self.rows]
        if self._partial and not self._sequence_parallel:
            rows = copy_to_tensor_model_parallel_region(rows)
        return rows.unsqueeze(1), None


@dataclass
class ResponseModel:
    """This rank's part of a loaded model, and its passes over samples.

    Attributes:
        chunks: layers of this rank, on `device`; several with virtual pipeline stages.
        wrapped: the modules that megatron's schedule runs: the chunks, or their data-parallel wrappers.
        architecture: architecture of the checkpoint.
        setup: settings of the model.
        config: layout of the model.
        device: device of the computation.
        partial_head: the output head is split over the tensor-parallel ranks (a value head is not).
    """

    chunks: list[GPTModel]
    wrapped: list[torch.nn.Module]
    architecture: Architecture
    setup: ModelSetup
    config: MegatronConfig
    device: torch.device
    partial_head: bool = True

    def __post_init__(self) -> None:
        self.pass_cost = PassCost.of(self.architecture)
        self._rows = [_ResponseRows(chunk, self.partial_head) for chunk in self.chunks if chunk.post_process]

    @property
    def is_output_rank(self) -> bool:
        """True if this rank reports the results of its data-parallel shard; other ranks have none, or the same."""
        return (
            bool(self._rows)
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )

    def share(self, parts: Sequence[Any], samples_of: Callable[[Any], tuple[Sequences, Tensor | None]]) -> list[Any]:
        """Select the micro-batches of this data-parallel rank; None marks a dummy pass.

        Args:
            parts: micro-batches of all ranks.
            samples_of: returns the sequences of a micro-batch, and the index of its samples in them (None for all), for
                the estimated operations that the ranks share evenly.
        """
        multiple = self.config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        rank, world_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        costs = None
        if world_size > 1:
            packed, cost = bool(self.config.use_sequence_packing), self.pass_cost
            costs = [cost_of_pass(sequences, cost, packed, index) for sequences, index in map(samples_of, parts)]
        return share_of_rank(parts, rank, world_size, multiple, costs)

    def micro_batch(self, sequences: Sequences, batch: TrainBatch | None) -> MicroBatch:
        """Lay out samples of the CPU for this rank, and copy them to the device."""
        packed_layout = pack(
            sequences,
            packed=bool(self.config.use_sequence_packing),
            sequence_parallel_size=self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1,
            qkv_format="thd" if uses_transformer_engine() else "sbhd",
        ).to(self.device)
        if batch is None:
            return MicroBatch(move(sequences, self.device), packed_layout, None)
        batch = batch.to(self.device)
        return MicroBatch(batch.sequences, packed_layout, batch)

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        read: Reader,
        *,
        train: bool,
        before_pass: Callable[[TrainBatch | None], None] | None = None,
    ) -> list[Any]:
        """Run micro-batches through megatron's schedule.

        Args:
            micro_batches: micro-batches of this rank.
            read: returns (loss, report) in training, else the report.
            train: compute gradients.
            before_pass: called with the batch of each micro-batch before its pass.

        Returns:
            The reports on ranks of the last pipeline stage; an empty list elsewhere.
        """

        def step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(batches)
            if before_pass is not None:
                before_pass(micro_batch.batch)
            output = self._forward(micro_batch, chunk)

            def after(rows: Tensor, non_loss_data: bool = False) -> Any:
                result = read(rows[0], micro_batch)
                if non_loss_data:
                    return result
                loss, report = result
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), report

            return output, after

        iterators = [iter(micro_batches) for _ in self.chunks]
        virtual = len(self.chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if virtual else iterators[0],
            model=self.wrapped if virtual else self.wrapped[0],
            num_microbatches=len(micro_batches),
            seq_length=max(item.packed_layout.input_ids.shape[1] for item in micro_batches),
            micro_batch_size=max(item.packed_layout.input_ids.shape[0] for item in micro_batches),
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _forward(self, micro_batch: MicroBatch, chunk: Any) -> Tensor:
        packed_layout = micro_batch.packed_layout
        for rows in self._rows:
            rows.rows = packed_layout.rows
        try:
            # megatron counts rotary positions; attention is causal and padding is on the right
            return chunk(packed_layout.input_ids, None, None, packed_seq_params=packed_layout.packed)
        finally:
            for rows in self._rows:
                rows.rows = None

    @property
    def head_weight(self) -> Tensor:
        """Return [V of this rank, H] of the output head, on the last pipeline stage."""
        last: Any = self.chunks[-1]
        tied = self.architecture.tie_word_embeddings
        return last.shared_embedding_or_output_weight() if tied else last.output_layer.weight

    @torch.no_grad()
    def over_samples(self, sequences: Sequences, read: Callable[[Tensor, MicroBatch], list[Tensor]]) -> list[Tensor]:
        """Compute results of every sample without gradient: the outputs of `read`, put together on the CPU.

        Args:
            read: returns results [b, t, ...] for the samples of a micro-batch, 0 where masked.

        Returns:
            Results [B, T, ...] in the given order, complete on every rank.
        """
        for module in self.wrapped:
            module.eval()
        ranks = parallel_state.get_data_parallel_world_size()
        parts = split_samples(
            sequences.lengths,
            self.setup.micro_batch_size,
            self.setup.max_tokens,
            bool(self.config.use_sequence_packing),
            ranks=ranks,
            costs=costs_of(sequences, self.pass_cost) if ranks > 1 else None,
        )
        mine = self.share(parts, lambda index: (sequences, index))
        nothing = torch.zeros(1, dtype=torch.int64)
        micro_batches = [self.micro_batch(sequences.rows(nothing if part is None else part), None) for part in mine]
        results = self.run(micro_batches, read, train=False)
        indices = [part for part in mine if part is not None]
        found = list(zip(indices, results, strict=False)) if self.is_output_rank else []
        return gather_samples(found, sequences, self.device)


def build_model(setup: ModelSetup, config: MegatronConfig) -> ResponseModel:
    """Build this rank's part of the model of `setup.checkpoint` on the local device and load its weights.

    Raises:
        ConfigError: the layout or the model is not supported.
        CheckpointError: weights are missing or do not fit.
    """
    if setup.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"megatron: dtype {setup.dtype} is not supported; use float32 or bfloat16")
    architecture = Architecture.from_checkpoint(setup.checkpoint)
    refuse_layout(config, architecture)
    initialize_parallel(config, setup.seed)
    megatron_config = transformer_config(architecture, setup.dtype, config)
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else list(range(virtual))
    device = local_device()
    chunks = [_build_chunk(architecture, megatron_config, stage).to(device) for stage in stages]
    load_weights(chunks, CheckpointReader(setup.checkpoint), architecture)
    return ResponseModel(chunks, list(chunks), architecture, setup, config, device)


def _build_chunk(architecture: Architecture, config: TransformerConfig, virtual_stage: int | None) -> GPTModel:
    tensor, whole = config.tensor_model_parallel_size, virtual_stage is None
    model = GPTModel(
        config,
        decoder_spec(architecture, config, virtual_stage),
        vocab_size=-(-architecture.vocab_size // tensor) * tensor,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=whole, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=whole, vp_stage=virtual_stage),
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,  # type: ignore[arg-type]
        rotary_percent=architecture.rotary.fraction,
        vp_stage=virtual_stage,
    )
    rotary: Any = model.rotary_pos_emb
    model.rotary_pos_emb = layer_rotary(architecture, rotary, gathers=not uses_transformer_engine())  # type: ignore[assignment]
    if architecture.family.scaled_embeddings and model.pre_process:
        _scale_embeddings(model, architecture.hidden_size**0.5)
    return model


def _scale_embeddings(model: GPTModel, factor: float) -> None:
    """Multiply the embeddings by a factor that is rounded to their dtype, as transformers does."""
    rounded = float(torch.tensor(factor, dtype=model.config.params_dtype))

    def scaled(_module: Any, _inputs: Any, embedded: Any) -> Tensor:
        return embedded * rounded

    model.embedding.register_forward_hook(scaled)
