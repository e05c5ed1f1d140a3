"""Configuration and capabilities of `megatron_train` and `megatron_infer` (no torch)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from roll_gspo.config.base import Problem
from roll_gspo.config.memory import Alternative, PassBytes, PassSize
from roll_gspo.config.strategy import DeviceParameters, Requirement, ScoreStrategyArgs, StrategyArgs, TrainStrategyArgs
from roll_gspo.models.size import architecture_of, size_of, supported_architecture_of
from roll_gspo.strategies.megatron.alternatives import alternatives
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.layout import (
    RankParameters,
    layout_problems,
    optimizer_shares,
    parameters_of_rank,
    transformer_engine_problems,
)
from roll_gspo.strategies.megatron.memory import pass_bytes

if TYPE_CHECKING:
    from roll_gspo.strategies.base import (
        ModelSetup,
        OptimizerSetup,
        ScoringStrategy,
        TrainedModel,
        TrainStrategy,
        ValueStrategy,
    )

AmountT = TypeVar("AmountT", DeviceParameters, PassBytes)

_SPLITS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


class MegatronArgs(StrategyArgs):
    """Common capabilities of both megatron-core engines."""

    strategy_config: MegatronConfig = MegatronConfig()
    """Layout and memory of the engine."""

    requirement: ClassVar[Requirement | None] = Requirement(
        "megatron.core", "pip install 'roll-gspo[megatron]'", "roll_gspo.strategies.megatron.engine"
    )
    is_distributed: ClassVar[bool] = True
    supports_token_budget: ClassVar[bool] = True
    reads_only_safetensors: ClassVar[bool] = True

    @property
    def model_parallel_sizes(self) -> dict[str, int]:
        """Tensor, pipeline and context parallelism."""
        c = self.strategy_config
        sizes = (c.tensor_model_parallel_size, c.pipeline_model_parallel_size, c.context_parallel_size)
        return {f"strategy_config.{key}": size for key, size in zip(_SPLITS, sizes, strict=True)}

    @property
    def gpu_environment(self) -> Mapping[str, str]:
        """One queue of GPU work if ranks share a layer: megatron-core needs it to overlap communication and products.

        Collectives of tensor and sequence parallelism must start before the product that hides them
        (`megatron/core/tensor_parallel/layers.py`). Blackwell GPUs do not need it.
        """
        c = self.strategy_config
        return (
            {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if c.tensor_model_parallel_size * c.context_parallel_size > 1 else {}
        )

    def missing_packages(self) -> Iterator[Problem]:
        """Yield settings that need TransformerEngine if it is not installed."""
        if importlib.util.find_spec("transformer_engine") is None:
            for problem in transformer_engine_problems(self.strategy_config):
                yield problem._replace(key=f"strategy_config.{problem.key}")

    @property
    def packs_samples(self) -> bool:
        """True with `use_sequence_packing`."""
        return bool(self.strategy_config.use_sequence_packing)

    def on_device(self, on_cuda: bool, model: str, *, padded: bool = False) -> Self:
        """Pack samples on GPUs if the configuration does not decide."""
        if self.strategy_config.use_sequence_packing is not None:
            return self
        config = self.strategy_config.model_copy(update={"use_sequence_packing": on_cuda and not padded})
        return self.model_copy(update={"strategy_config": config})

    def layout_text(self, num_devices: int) -> str:
        """Return e.g. `TP 4 + SP · PP 2 · CP 1 · EP 8 · ETP 1 · DP 2`."""
        c = self.strategy_config
        virtual = c.virtual_pipeline_model_parallel_size
        sizes = [
            f"TP {c.tensor_model_parallel_size}{' + SP' if c.sequence_parallel else ''}",
            f"PP {c.pipeline_model_parallel_size}",
            *([f"VPP {virtual}"] if virtual else []),
            f"CP {c.context_parallel_size}",
            f"EP {c.expert_model_parallel_size}",
            *([f"ETP {c.expert_tensor_size}"] if c.expert_model_parallel_size > 1 else []),
            f"DP {num_devices // c.model_parallel_size}",
        ]
        return " · ".join(sizes)

    def offload_problem(self, on_cuda: bool | None) -> str | None:
        """Return None: weights and optimizer state move to host memory and back."""
        return None

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield reasons why the layout does not fit the model, the ranks or the machine."""
        architecture = architecture_of(model)
        for problem in layout_problems(architecture, self.strategy_config, num_devices, on_cuda):
            yield problem._replace(key=f"strategy_config.{problem.key}")

    def parameters_per_device(
        self, model: str, num_devices: int, *, value_head: bool
    ) -> Sequence[DeviceParameters] | None:
        """Count the parameters of every rank; stages of a pipeline differ."""
        stages = self._parameters_of_stages(model, value_head)
        if stages is None:
            return None
        shared, experts = optimizer_shares(self.strategy_config, num_devices)
        held = [DeviceParameters(stage.total, stage.shared / shared + stage.experts / experts) for stage in stages]
        return _of_devices(held, num_devices)

    def pass_memory(
        self, model: str, num_devices: int, size: PassSize, itemsize: int, *, train: bool, value_head: bool
    ) -> Sequence[PassBytes] | None:
        """Estimate the passes of every rank; stages of a pipeline differ."""
        architecture, layout = supported_architecture_of(model), self.strategy_config
        if architecture is None:
            return None
        stages = range(layout.pipeline_model_parallel_size)
        of_stages = [
            pass_bytes(architecture, layout, stage, size, itemsize, train=train, head=not value_head)
            for stage in stages
        ]
        return _of_devices(of_stages, num_devices)

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield layouts that split the model further."""
        yield from self._prefixed(alternatives(supported_architecture_of(model), self.strategy_config, num_devices))

    def _prefixed(self, found: Iterator[Alternative]) -> Iterator[Alternative]:
        for cost, changes in found:
            yield Alternative(cost, {f"strategy_config.{key}": value for key, value in changes.items()})

    def _parameters_of_stages(self, model: str, value_head: bool) -> list[RankParameters] | None:
        """Return the parameters of a rank of each stage, counted from the architecture or estimated from the name."""
        layout = self.strategy_config
        pipeline = layout.pipeline_model_parallel_size
        if (architecture := supported_architecture_of(model)) is not None:
            head = "value" if value_head else "vocabulary"
            return [parameters_of_rank(architecture, layout, stage, head) for stage in range(pipeline)]
        size = size_of(model)
        if size is None:
            return None
        shared = (size.num_parameters - size.num_expert_parameters) // (layout.tensor_model_parallel_size * pipeline)
        return [RankParameters(shared, size.num_expert_parameters // layout.expert_copy_size)] * pipeline


def _of_devices(of_stages: Sequence[AmountT], num_devices: int) -> list[AmountT]:
    """Return the amount on each device; the ranks of a pipeline stage are consecutive."""
    per_stage = max(num_devices // len(of_stages), 1)
    amounts = [amount for amount in of_stages for _ in range(per_stage)]
    return (amounts + [max(of_stages)] * num_devices)[:num_devices]


class MegatronTrainArgs(MegatronArgs, TrainStrategyArgs):
    """Train with megatron-core."""

    has_value_head: ClassVar[bool] = True
    can_replay_routing: ClassVar[bool] = True
    why_no_lora: ClassVar[str] = "its layers fuse and split the matrices that an adapter is attached to"

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield layouts that split model or optimizer further, or recompute activations."""
        architecture, layout = supported_architecture_of(model), self.strategy_config
        yield from self._prefixed(alternatives(architecture, layout, num_devices, train=True))

    def value_problems(self) -> Iterator[Problem]:
        """Yield keys of the output head, which a critic replaces."""
        c = self.strategy_config
        for key, is_set in (("fp32_lm_head", c.fp32_lm_head is not None), ("fused_head", c.fused_head != "auto")):
            if is_set:
                yield Problem(f"strategy_config.{key}", "is about logits, and a critic has none; remove it")

    @property
    def has_float32_gradients(self) -> bool:
        """True with `grad_reduce_in_fp32`."""
        return self.strategy_config.grad_reduce_in_fp32

    @property
    def replay_conflicts(self) -> dict[str, str]:
        """Keys by which a rank has only some tokens or layers, or another order of them."""
        c = self.strategy_config
        switches = {"sequence_parallel": c.sequence_parallel, "use_sequence_packing": c.use_sequence_packing}
        switches["moe_router_fusion"] = c.moe_router_fusion  # the kernel chooses experts by itself
        conflicts = {key: str(size) for key, size in self.model_parallel_sizes.items() if size > 1}
        return conflicts | {f"strategy_config.{key}": "true" for key, is_on in switches.items() if is_on}

    def build_train(self, model: ModelSetup, optimizer: OptimizerSetup) -> TrainStrategy:
        """Build this rank of a `MegatronTrain`."""
        from roll_gspo.strategies.megatron.engine.train import MegatronTrain

        return MegatronTrain(model, optimizer, self.strategy_config)

    def build_value(self, model: ModelSetup, optimizer: OptimizerSetup) -> ValueStrategy:
        """Build this rank of a `MegatronValue`."""
        from roll_gspo.strategies.megatron.engine.value import MegatronValue

        return MegatronValue(model, optimizer, self.strategy_config)

    def load_trained(self, model: ModelSetup, optimizer: OptimizerSetup, folder: Path) -> TrainedModel:
        """Read the weights of any layout into a model of one rank, without an optimizer."""
        from roll_gspo.strategies.megatron.engine.trained import MegatronTrained

        return MegatronTrained(model, folder)


class MegatronInferArgs(MegatronArgs, ScoreStrategyArgs):
    """Score tokens with megatron-core."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that only training uses."""
        yield from super().broken_rules()
        c = self.strategy_config
        for key, value in (
            ("use_distributed_optimizer", c.use_distributed_optimizer),
            ("overlap_grad_reduce", c.overlap_grad_reduce),
            ("overlap_param_gather", c.overlap_param_gather),
            ("grad_reduce_in_fp32", not c.grad_reduce_in_fp32),
            ("gradient_accumulation_fusion", c.gradient_accumulation_fusion),
            ("recompute_granularity", c.recompute_granularity),
        ):
            if value:
                message = "is used only with megatron_train (megatron_infer has no gradients); remove it"
                yield Problem(f"strategy_config.{key}", message, ("strategy_name",))

    def build_scorer(self, model: ModelSetup) -> ScoringStrategy:
        """Build this rank of a `MegatronInfer`."""
        from roll_gspo.strategies.megatron.engine.infer import MegatronInfer

        return MegatronInfer(model, self.strategy_config)
