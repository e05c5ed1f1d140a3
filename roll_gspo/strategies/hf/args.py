"""Configuration and capabilities of `hf_train` and `hf_infer` (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from roll_gspo.config.base import Problem
from roll_gspo.config.memory import Alternative, GenerationBytes, PassBytes, PassSize
from roll_gspo.config.strategy import (
    GenerateStrategyArgs,
    Requirement,
    ScoreStrategyArgs,
    StrategyArgs,
    TrainStrategyArgs,
)
from roll_gspo.models.size import supported_architecture_of
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.known_models import attention_problems, check_family
from roll_gspo.strategies.memory import kv_bytes_per_token
from roll_gspo.strategies.transformers_memory import pass_bytes

if TYPE_CHECKING:
    from roll_gspo.strategies.base import GenerationSetup, ModelSetup, OptimizerSetup
    from roll_gspo.strategies.hf.infer import HfInfer
    from roll_gspo.strategies.hf.train import HfTrain
    from roll_gspo.strategies.hf.value import HfValue


class HfArgs(StrategyArgs):
    """Common capabilities of both transformers engines."""

    strategy_config: HfConfig = HfConfig()
    """Options of the engine."""

    requirement: ClassVar[Requirement | None] = Requirement(
        "transformers", "pip install transformers", "roll_gspo.strategies.hf.model"
    )

    def offload_problem(self, on_cuda: bool | None) -> str | None:
        """Return None: weights and optimizer state move to host memory and back."""
        return None

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield an implementation of attention that is wrong for the model; any layout fits.

        Raises:
            ConfigError: the installed version of transformers does not know the model's architecture.
        """
        check_family(model)
        yield from attention_problems(model, self.strategy_config.attn_implementation)

    def pass_memory(
        self, model: str, num_devices: int, size: PassSize, itemsize: int, *, train: bool, value_head: bool
    ) -> Sequence[PassBytes] | None:
        """Estimate the passes; every device has the whole model."""
        architecture = supported_architecture_of(model)
        if architecture is None:
            return None
        recompute = self.strategy_config.gradient_checkpointing
        found = pass_bytes(
            architecture, size, itemsize, train=train, head=not value_head, recompute=recompute, autocast=True
        )
        return [found] * num_devices

    def _generation_problems(self) -> Iterator[Problem]:
        """Yield keys of generation that are set for an engine that never generates."""
        if self.strategy_config.generate_batch_size != HfConfig().generate_batch_size:
            message = "is used only if the engine generates (actor_infer); remove it"
            yield Problem("strategy_config.generate_batch_size", message)


class HfTrainArgs(HfArgs, TrainStrategyArgs):
    """Train with plain transformers: the readable reference implementation."""

    has_value_head: ClassVar[bool] = True
    has_float32_weights: ClassVar[bool] = True
    supports_lora: ClassVar[bool] = True

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that only generation uses."""
        yield from super().broken_rules()
        yield from self._generation_problems()

    def value_problems(self) -> Iterator[Problem]:
        """Yield keys of the output head, which a critic replaces."""
        if self.strategy_config.fp32_lm_head is not None:
            yield Problem("strategy_config.fp32_lm_head", "is about logits, and a critic has none; remove it")

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield recomputation of all layers."""
        if not self.strategy_config.gradient_checkpointing:
            yield Alternative(2, {"strategy_config.gradient_checkpointing": True})

    def build_train(self, model: ModelSetup, optimizer: OptimizerSetup) -> HfTrain:
        """Build an `HfTrain`."""
        from roll_gspo.strategies.hf.train import HfTrain

        return HfTrain(model, optimizer, self.strategy_config)

    def build_value(self, model: ModelSetup, optimizer: OptimizerSetup) -> HfValue:
        """Build an `HfValue`."""
        from roll_gspo.strategies.hf.value import HfValue

        return HfValue(model, optimizer, self.strategy_config)


class HfInferArgs(HfArgs, ScoreStrategyArgs, GenerateStrategyArgs):
    """Score or generate with plain transformers."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that only training uses."""
        yield from super().broken_rules()
        if self.strategy_config.gradient_checkpointing:
            message = "is used only with hf_train (hf_infer has no gradients); remove it"
            yield Problem("strategy_config.gradient_checkpointing", message, ("strategy_name",))

    def scoring_problems(self) -> Iterator[Problem]:
        """Yield keys that only generation uses."""
        yield from self._generation_problems()

    def generation_memory(
        self, model: str, weights: float, device: float, itemsize: int, sequence_length: int
    ) -> GenerationBytes | None:
        """Return the cache of `generate_batch_size` full sequences, and logits of one token of each."""
        architecture = supported_architecture_of(model)
        if architecture is None:
            return None
        num_tokens = self.strategy_config.generate_batch_size * sequence_length
        logits = 3 * 4 * self.strategy_config.generate_batch_size * architecture.vocab_size
        return GenerationBytes(num_tokens * kv_bytes_per_token(architecture, itemsize), logits, 0.0, num_tokens)

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield smaller batches of generation."""
        size = self.strategy_config.generate_batch_size
        for cost in range(1, size.bit_length()):
            yield Alternative(cost, {"strategy_config.generate_batch_size": size >> cost})

    def build_scorer(self, model: ModelSetup) -> HfInfer:
        """Build an `HfInfer`."""
        from roll_gspo.strategies.hf.infer import HfInfer

        return HfInfer(model, self.strategy_config)

    def build_generator(self, model: ModelSetup, generation: GenerationSetup) -> HfInfer:
        """Build an `HfInfer`; it starts with the weights of the checkpoint and receives others either way."""
        return self.build_scorer(model)
