"""Configuration and capabilities of `fsdp2_train` and `fsdp2_infer` (no torch)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from roll_gspo.config.base import Problem
from roll_gspo.config.memory import Alternative, PassBytes, PassSize
from roll_gspo.config.strategy import DeviceParameters, Requirement, ScoreStrategyArgs, StrategyArgs, TrainStrategyArgs
from roll_gspo.models.size import built_type_of, size_of, supported_architecture_of
from roll_gspo.strategies.fsdp2.config import PACKED_FAMILIES, PLAIN_HEADS, Fsdp2Config
from roll_gspo.strategies.fsdp2.memory import gathered_bytes
from roll_gspo.strategies.known_models import attention_problems, check_family
from roll_gspo.strategies.memory import head_bytes
from roll_gspo.strategies.transformers_memory import pass_bytes

if TYPE_CHECKING:
    from roll_gspo.strategies.base import (
        ModelSetup,
        OptimizerSetup,
        ScoringStrategy,
        TrainedModel,
        TrainStrategy,
        ValueStrategy,
    )


class Fsdp2Args(StrategyArgs):
    """Common capabilities of both FSDP2 engines."""

    strategy_config: Fsdp2Config = Fsdp2Config()
    """Options of the engine."""

    requirement: ClassVar[Requirement | None] = Requirement(
        "transformers", "pip install transformers", "roll_gspo.strategies.fsdp2.engine"
    )
    is_distributed: ClassVar[bool] = True
    supports_token_budget: ClassVar[bool] = True
    reads_only_safetensors: ClassVar[bool] = True

    @property
    def packs_samples(self) -> bool:
        """True with `use_sequence_packing`."""
        return bool(self.strategy_config.use_sequence_packing)

    def on_device(self, on_cuda: bool, model: str, *, padded: bool = False) -> Self:
        """Pack samples on GPUs if the configuration does not decide and the model can be packed."""
        config = self.strategy_config
        if config.use_sequence_packing is not None:
            return self
        packed = (
            on_cuda and not padded and config.attn_implementation == "sdpa" and built_type_of(model) in PACKED_FAMILIES
        )
        return self.model_copy(update={"strategy_config": config.model_copy(update={"use_sequence_packing": packed})})

    def offload_problem(self, on_cuda: bool | None) -> str | None:
        """Return None: weights and optimizer state move to host memory and back."""
        return None

    def layout_text(self, num_devices: int) -> str:
        """Return e.g. `sharded over 8`."""
        return f"sharded over {num_devices}"

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield options that do not fit the model; any number of ranks does.

        Raises:
            ConfigError: the installed version of transformers does not know the model's architecture.
        """
        check_family(model)
        yield from attention_problems(model, self.strategy_config.attn_implementation)
        family, config = built_type_of(model), self.strategy_config
        if config.use_sequence_packing and family not in (None, *PACKED_FAMILIES):
            message = f"samples of model_type '{family}' cannot be packed (known: {', '.join(PACKED_FAMILIES)})"
            yield Problem("strategy_config.use_sequence_packing", f"{message}; set it to false or null")
        if config.fused_head != "auto" and family not in (None, *PLAIN_HEADS):
            message = f"{config.fused_head} is not used: model_type '{family}' needs whole logits; remove it"
            yield Problem("strategy_config.fused_head", message)

    def missing_packages(self) -> Iterator[Problem]:
        """Yield a kernel of log-probs whose package is not installed."""
        if self.strategy_config.fused_head == "triton" and importlib.util.find_spec("triton") is None:
            message = "triton is not installed; set auto, or run: pip install triton"
            yield Problem("strategy_config.fused_head", message)

    def parameters_per_device(
        self, model: str, num_devices: int, *, value_head: bool
    ) -> Sequence[DeviceParameters] | None:
        """Return even parts of the model; nothing with `cpu_offload`."""
        size = size_of(model)
        if size is None:
            return None
        if self.strategy_config.cpu_offload:
            return [DeviceParameters(0.0, 0.0)] * num_devices
        share = size.num_parameters / num_devices
        return [DeviceParameters(share, share)] * num_devices

    def pass_memory(
        self, model: str, num_devices: int, size: PassSize, itemsize: int, *, train: bool, value_head: bool
    ) -> Sequence[PassBytes] | None:
        """Estimate the passes: those of one device, and the parameters that are gathered meanwhile."""
        architecture, parameters = supported_architecture_of(model), size_of(model)
        if architecture is None or parameters is None:
            return None
        recompute, plain = self.strategy_config.gradient_checkpointing, built_type_of(model) in PLAIN_HEADS
        whole_logits = not value_head and not plain
        found = pass_bytes(
            architecture, size, itemsize, train=train, head=whole_logits, recompute=recompute, autocast=False
        )
        logits = found.logits
        if plain and not value_head:
            logits = head_bytes(architecture, size.predicted, itemsize, shards=1, train=train)
        gathered = gathered_bytes(architecture, parameters.num_parameters, self.strategy_config, itemsize, train=train)
        return [PassBytes(found.activations + gathered, logits)] * num_devices


class Fsdp2TrainArgs(Fsdp2Args, TrainStrategyArgs):
    """Train any decoder of transformers on many ranks."""

    has_value_head: ClassVar[bool] = True
    has_float32_weights: ClassVar[bool] = True
    supports_lora: ClassVar[bool] = True

    def value_problems(self) -> Iterator[Problem]:
        """Yield keys of the output head, which a critic replaces."""
        c = self.strategy_config
        for key, is_set in (("fp32_lm_head", c.fp32_lm_head is not None), ("fused_head", c.fused_head != "auto")):
            if is_set:
                yield Problem(f"strategy_config.{key}", "is about logits, and a critic has none; remove it")

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield recomputation of all layers, gathering parameters twice, and state in host memory."""
        config = self.strategy_config
        if not config.reshard_after_forward:
            yield Alternative(1, {"strategy_config.reshard_after_forward": True})
        if not config.gradient_checkpointing:
            yield Alternative(2, {"strategy_config.gradient_checkpointing": True})
        if not config.cpu_offload:
            yield Alternative(6, {"strategy_config.cpu_offload": True})

    def build_train(self, model: ModelSetup, optimizer: OptimizerSetup) -> TrainStrategy:
        """Build this rank of an `Fsdp2Train`."""
        from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train

        return Fsdp2Train(model, optimizer, self.strategy_config)

    def build_value(self, model: ModelSetup, optimizer: OptimizerSetup) -> ValueStrategy:
        """Build this rank of an `Fsdp2Value`."""
        from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value

        return Fsdp2Value(model, optimizer, self.strategy_config)

    def load_trained(self, model: ModelSetup, optimizer: OptimizerSetup, folder: Path) -> TrainedModel:
        """Read the weights of any number of ranks into a model of one rank, without an optimizer.

        An adapter is loaded with its small optimizer.
        """
        if model.lora is not None:
            return super().load_trained(model, optimizer, folder)
        from roll_gspo.strategies.fsdp2.engine.trained import Fsdp2Trained

        return Fsdp2Trained(model, self.strategy_config, folder)


class Fsdp2InferArgs(Fsdp2Args, ScoreStrategyArgs):
    """Score tokens with any decoder of transformers on many ranks."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that only training uses."""
        yield from super().broken_rules()
        default, given = Fsdp2Config(), self.strategy_config
        for key, is_set in (
            ("gradient_checkpointing", given.gradient_checkpointing),
            ("reshard_after_forward", given.reshard_after_forward != default.reshard_after_forward),
            ("cpu_offload", given.cpu_offload),
            ("grad_reduce_in_fp32", given.grad_reduce_in_fp32 != default.grad_reduce_in_fp32),
        ):
            if is_set:
                message = "is used only with fsdp2_train (fsdp2_infer has no gradients); remove it"
                yield Problem(f"strategy_config.{key}", message, ("strategy_name",))

    def build_scorer(self, model: ModelSetup) -> ScoringStrategy:
        """Build this rank of an `Fsdp2Infer`."""
        from roll_gspo.strategies.fsdp2.engine.infer import Fsdp2Infer

        return Fsdp2Infer(model, self.strategy_config)
