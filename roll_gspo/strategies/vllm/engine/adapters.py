"""Adapters inside a vLLM engine: `AdapterLoader` in each worker, `AdapterSlots` where the requests are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm import LLM
from vllm.config import ModelConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_moe_model, parse_fine_tuned_lora_name
from vllm.platforms import current_platform

from roll_gspo.config.lora import ALL_LINEAR
from roll_gspo.errors import ConfigError, WeightTransferError
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.vllm.engine.loading import shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import AdapterManifest, expected_shapes, linear_names
from roll_gspo.strategies.vllm.memory import adapter_slots, slot_rank
from roll_gspo.strategies.weight_broadcast_format import bytes_of

_LORA = "actor_train.model_args.lora"


def adapter_args(checkpoint: Path, lora: LoraSetup, versions: int) -> dict[str, object]:
    """Return the arguments of an engine that holds the adapters of `versions` versions, and one more while it loads.

    Raises:
        ConfigError: vLLM has no adapters of this rank.
    """
    rank = slot_rank(lora.rank)
    if rank is None:
        raise ConfigError(f"{_LORA}.rank: {lora.rank} is above the largest of vLLM; lower it, or set sync: merged")
    slots = adapter_slots(versions)
    names = sorted({name.rpartition(".")[2] for name in lora.target_modules})
    if names == [ALL_LINEAR]:
        names = linear_names(expected_shapes(checkpoint, tied=True))
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": slots,
        "max_cpu_loras": slots,
        # Without names vLLM allocates adapters of the embedding and the output head, too.
        "lora_target_modules": names,
    }


def check_targets(llm: LLM, lora: LoraSetup) -> None:
    """Check that the engine can adapt every target module.

    Raises:
        ConfigError: it cannot adapt one, or none of a mixture of experts on a CPU.
    """
    if current_platform.is_cpu() and any(llm.apply_model(is_moe_model)):
        raise ConfigError(f"{_LORA}.sync: vLLM has no experts with adapters on a CPU; set merged")
    adaptable = {name.rpartition(".")[2] for name in llm.apply_model(adaptable_modules)[0]}
    wrong = [name for name in lora.target_modules if name != ALL_LINEAR and name.rpartition(".")[2] not in adaptable]
    if wrong:
        raise ConfigError(
            f"{_LORA}.target_modules: vLLM cannot adapt {', '.join(wrong)} of this model, only "
            f"{', '.join(sorted(adaptable))}; remove the former, or set {_LORA}.sync: merged"
        )


def adaptable_modules(model: nn.Module) -> set[str]:
    """Return the modules of vLLM's model that have adapters, with the parts of a merged module instead of itself."""
    manager = _manager(model)
    return {part for name in manager.modules for part in manager.packed_modules.get(name, [name])}


def _manager(model: nn.Module) -> LoRAModelManager:
    """Return vLLM's manager, which it attaches to the model (internal, vLLM 0.32)."""
    attributes: Any = model
    return attributes.lora_manager


class AdapterLoader:
    """Loads adapters from memory into the model of one worker. vLLM itself reads them from files.

    Args:
        model: the model of an engine with `adapter_args`.
        model_config: vLLM's configuration of the model.
        lora: the adapter.
    """

    def __init__(self, model: nn.Module, model_config: ModelConfig, lora: LoraSetup) -> None:
        self._manager = _manager(model)
        attributes: Any = model
        try:
            self._mapper = attributes.hf_to_vllm_mapper.get_rename_mapper()
        except AttributeError:  # a model with the names of the checkpoint
            self._mapper = None
        self._helper = PEFTHelper.from_dict(
            {
                "r": lora.rank,
                "lora_alpha": lora.alpha,
                "use_rslora": lora.use_rslora,
                "target_modules": list(lora.target_modules),
            }
        )
        self._adaptable = adaptable_modules(model)
        self._manifest = AdapterManifest(lora.rank, shapes_of_full_model(model_config), self._can_adapt)
        self._newest: tuple[int, bytes] | None = None
        self._number = 0

    def load(self, version: int, number: int, tensors: Sequence[tuple[str, Tensor]]) -> int:
        """Load an adapter under a new number and return it.

        If the last adapter has the same version and values, it is kept, and its number is returned.

        Args:
            version: version of the adapter.
            number: number that no adapter had.
            tensors: tensors on the CPU under PEFT's names. vLLM scales them in place.

        Raises:
            WeightTransferError: the tensors differ from the manifest; nothing has changed.
        """
        wrong = self._manifest.check([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors])
        if wrong:
            raise WeightTransferError("weight transfer: " + "; ".join(wrong) + "; the old adapter was kept")
        named = dict(tensors)
        newest = version, _digest(named)
        if newest != self._newest or self._number not in self._manager.list_adapters():
            self._add(number, named)
            self._newest, self._number = newest, number
        return self._number

    def _add(self, number: int, tensors: dict[str, Tensor]) -> None:
        dtype: Any = self._manager.lora_config.lora_dtype
        adapter = LoRAModel.from_lora_tensors(
            number, tensors, self._helper, device="cpu", dtype=dtype, weights_mapper=self._mapper
        )
        try:
            self._manager.add_adapter(adapter)
            self._manager.activate_adapter(number)
        except BaseException:
            self._manager.remove_adapter(number)
            raise

    def _can_adapt(self, module: str) -> bool:
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", self._mapper)
        return name in self._adaptable


class AdapterSlots:
    """The adapters that an engine holds, and the one that new requests use.

    Args:
        llm: the engine, built with `adapter_args`.
        versions: versions that may have requests at the same time.

    Attributes:
        newest: adapter of new requests; None until the first update.
    """

    def __init__(self, llm: LLM, versions: int) -> None:
        self._engine = llm.llm_engine
        self.versions = versions
        self.newest: LoRARequest | None = None
        self._held: dict[int, str] = {}  # number of an adapter -> its name
        self._last = 0

    def next_number(self) -> int:
        """Return a number that no adapter of this engine had."""
        self._last += 1
        return self._last

    def adopt(self, version: int, number: int) -> None:
        """Let new requests use the adapter `number`, which every worker has loaded."""
        if number in self._held:
            return
        name = f"policy-{version}"
        if name in self._held.values():  # vLLM compares adapters by name
            name = f"{name}-{number}"
        self._held[number] = name
        # The prefix cache is keyed by name and path. vLLM reads the path only if it does not hold the number.
        self.newest = LoRARequest(name, number, f"memory/{number}")

    def discard(self, number: int) -> None:
        """Remove an adapter that some workers may have loaded, after an error of others."""
        self._engine.remove_lora(number)

    def free(self, used: Collection[int]) -> None:
        """Remove adapters that are neither in use nor the newest."""
        for number in [held for held in self._held if held not in used]:
            if self.newest is None or number != self.newest.lora_int_id:
                self._engine.remove_lora(number)
                del self._held[number]

    @property
    def names(self) -> list[str]:
        """Names of the adapters, the oldest first."""
        return list(self._held.values())


def _digest(tensors: dict[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor.contiguous()).numpy().data)
    return digest.digest()
