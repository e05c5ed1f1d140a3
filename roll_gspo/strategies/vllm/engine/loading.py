"""Load a full set of Hugging Face tensors into an initialised vLLM model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.vllm.engine.manifest import expected_shapes


def shapes_of_full_model(model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors of the model, read from its checkpoint."""
    tied = bool(model_config.hf_text_config.tie_word_embeddings)
    return expected_shapes(Path(model_config.model), tied)


class ModelLoader:
    """Replaces all weights of a vLLM model, layer by layer: `begin`, `load` any number of times, `finish`.

    If a load stops between `begin` and `finish`, the model is unusable.
    """

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self._model = model
        self._config = model_config
        self._loaded: set[str] = set()
        self.half_loaded = False

    def begin(self) -> None:
        """Prepare the model for new weights.

        Raises:
            WeightTransferError: an earlier load stopped half-way.
        """
        if self.half_loaded:
            raise WeightTransferError("weight transfer: an earlier transfer stopped half-way; build a new engine")
        self.half_loaded = True
        self._loaded.clear()
        if current_platform.is_cpu():
            _repack_experts_on_load(self._model)
        initialize_layerwise_reload(self._model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the tensors. Their memory may be reused after the last tensor of each layer has been loaded."""
        loader: Any = self._model  # vLLM's models add `load_weights` to nn.Module
        self._loaded |= set(loader.load_weights(iter(weights)) or ())

    def finish(self) -> None:
        """Complete the load.

        Raises:
            WeightTransferError: a parameter received no tensor.
        """
        finalize_layerwise_reload(self._model, self._config)
        if current_platform.is_cpu():
            _repack_output_heads(self._model)
            _check_experts(self._model)
        untouched = {name for name, _ in self._model.named_parameters()} - self._loaded - _derived(self._model)
        if untouched:
            raise WeightTransferError(
                f"weight transfer: parameters of the engine received no tensor: {sorted(untouched)[:10]}"
            )
        self.half_loaded = False

    def replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all tensors.

        Raises:
            WeightTransferError: see `begin` and `finish`.
        """
        self.begin()
        self.load(weights)
        self.finish()


def _repack_experts_on_load(model: torch.nn.Module) -> None:
    """Force repacking: vLLM 0.32 on a CPU packs new MoE weights only if no kernel exists yet."""
    for module in model.modules():
        if isinstance(module, RoutedExperts) and isinstance(module.quant_method, UnquantizedFusedMoEMethod):
            module.quant_method.moe_kernel = None


def _check_experts(model: torch.nn.Module) -> None:
    """Check that new experts were packed: vLLM 0.32 does not notice that those of gpt-oss are loaded."""
    for name, module in model.named_modules():
        method = module.quant_method if isinstance(module, RoutedExperts) else None
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is None:
            raise WeightTransferError(
                f"weight transfer: vLLM cannot load new experts into '{name}' of {type(model).__name__}; generate with "
                "strategy_name hf_infer"
            )


def _derived(model: torch.nn.Module) -> set[str]:
    """Return parameters that vLLM computes at the end of a load: absorbed projections of latent attention."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, MLAAttention)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def _repack_output_heads(model: torch.nn.Module) -> None:
    """Repack tied output heads: vLLM 0.32 on a CPU loads them with the embedding but keeps the old packed copy."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
