"""Engines: the registry of `strategy_name`, and base classes that declare the features of an engine.

An engine is one class of `strategy_args` per `strategy_name`. The class subclasses `TrainStrategyArgs`,
`ScoreStrategyArgs` or `GenerateStrategyArgs`, declares its options as fields, and builds the strategies of
`roll_gspo.strategies.base`. The rest of the package uses only what these base classes declare. The plan reads the
class, so its module must not import torch.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from roll_gspo.config.base import Problem, Schema
from roll_gspo.config.memory import Alternative, GenerationBytes, PassBytes, PassSize
from roll_gspo.errors import ConfigError
from roll_gspo.registry import Registry

STRATEGIES = Registry(
    "strategy_name",
    {
        "megatron_train": "roll_gspo.strategies.megatron.args:MegatronTrainArgs",
        "megatron_infer": "roll_gspo.strategies.megatron.args:MegatronInferArgs",
        "fsdp2_train": "roll_gspo.strategies.fsdp2.args:Fsdp2TrainArgs",
        "fsdp2_infer": "roll_gspo.strategies.fsdp2.args:Fsdp2InferArgs",
        "hf_train": "roll_gspo.strategies.hf.args:HfTrainArgs",
        "hf_infer": "roll_gspo.strategies.hf.args:HfInferArgs",
        "vllm": "roll_gspo.strategies.vllm.args:VllmArgs",
    },
)

# Engines of ROLL, each with the engine that runs instead and its options, and options of the former that are kept.
ROLL_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepspeed_train": ("megatron_train", {"use_distributed_optimizer": True}),
    "deepspeed_infer": ("megatron_infer", {}),
    "sglang": ("vllm", {}),
}
ROLL_ENGINE_KEYS = {"mem_fraction_static": "gpu_memory_utilization"}

_FLOAT32 = {"float32": True, "fp32": True, "bfloat16": False, "bf16": False}
_FSDP2_BOTH = {
    "fsdp_size": "the model is sharded over all ranks of the role",
    "param_dtype": "model_args.dtype decides",
    "wrap_policy": "every layer is a unit",
}
# Options that ROLL names differently, by engine: what decides instead, or the key here and its values (None: as given).
ROLL_OPTIONS: dict[str, Mapping[str, str | tuple[str, Mapping[Any, Any] | None]]] = {
    "fsdp2_train": {
        **_FSDP2_BOTH,
        "reduce_dtype": ("grad_reduce_in_fp32", _FLOAT32),
        "offload_policy": ("cpu_offload", None),
    },
    "fsdp2_infer": {
        **_FSDP2_BOTH,
        "reduce_dtype": "a model that only scores has no gradients",
        "offload_policy": "a model that only scores stays on its device",
    },
}


class Requirement(NamedTuple):
    """A package that an engine needs.

    Attributes:
        module: the module that must be installed.
        install: the command that installs it.
        probe: module of the engine, which `roll_gspo.doctor` imports; `module` if empty.
    """

    module: str
    install: str
    probe: str = ""


class DeviceParameters(NamedTuple):
    """Number of parameters on one device, and number of those with optimizer state on it."""

    weights: float
    optimizer: float


class StrategyArgs(Schema):
    """Base class of all engines. Its defaults describe an engine that computes on one device.

    Keys in problems and in `model_parallel_sizes` are relative to the `strategy_args` block.
    """

    strategy_name: str
    """Engine: a shipped name, or the dotted path of your own class."""

    requirement: ClassVar[Requirement | None] = None
    """The package that must be installed; None if there is none."""
    is_distributed: ClassVar[bool] = False
    """A role that trains or scores may have several ranks, one per device. They form one process group."""
    supports_token_budget: ClassVar[bool] = False
    """`max_tokens_per_microbatch_in_infer` limits a forward pass by tokens, in place of `infer_batch_size`."""
    needs_16_bits_on_gpus: ClassVar[bool] = False
    """The fast kernels of the engine on GPUs compute in bf16 or fp16 only."""
    reads_only_safetensors: ClassVar[bool] = False
    """The engine cannot read weights in `pytorch_model.bin`."""

    @model_validator(mode="wrap")
    @classmethod
    def _select_engine(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate the keys of a block by the class that its `strategy_name` selects."""
        if not isinstance(values, Mapping) or not inspect.isabstract(cls):
            return handler(values)
        if "strategy_name" not in values:
            raise _name_error(cls, InitErrorDetails(type="missing", loc=("strategy_name",), input=values))
        return args_class(values["strategy_name"], cls).model_validate(values)

    @property
    def model_parallel_sizes(self) -> dict[str, int]:
        """Keys that split one model copy over devices, with their values. Their product is the number of devices."""
        return {}

    @property
    def model_parallel_size(self) -> int:
        """Number of devices that hold one copy of the model."""
        return math.prod(self.model_parallel_sizes.values())

    @property
    def devices_per_worker(self) -> int:
        """Devices of one worker process: 1 if each device has a rank, `model_parallel_size` if it splits the model."""
        return 1

    @property
    def gpu_environment(self) -> Mapping[str, str]:
        """Variables for a worker process on GPUs; those of the user's environment and `system_envs` replace them."""
        return {}

    @property
    def gpu_memory_share(self) -> float | None:
        """Share of a GPU's memory that the engine reserves when it starts; None if it takes what it needs."""
        return None

    @property
    def packs_samples(self) -> bool:
        """True if micro-batches use the packed layout, without padding."""
        return False

    def on_device(self, on_cuda: bool, model: str, *, padded: bool = False) -> Self:
        """Return the arguments with the values that null stands for.

        Args:
            on_cuda: the role computes on GPUs.
            model: Hugging Face name or folder, or a `builtin:` name.
            padded: the role needs padded samples, because recorded experts are not packed.
        """
        return self

    def layout_text(self, num_devices: int) -> str:
        """Return the parallel sizes of a role for the plan, '' if there are none."""
        return ""

    def layout_problems(self, model: str, num_devices: int, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield why a model cannot run on this many devices.

        Args:
            model: Hugging Face name or folder, or a `builtin:` name.
            num_devices: devices of the role.
            on_cuda: True if they are GPUs, None if not known yet.

        Raises:
            ConfigError: if the engine does not support the model.
        """
        yield from ()

    def shared_process_problems(self) -> Iterator[Problem]:
        """Yield settings that must not be used in a process that other roles share."""
        yield from ()

    def missing_packages(self) -> Iterator[Problem]:
        """Yield settings that need a package of GPU machines that is not installed here."""
        yield from ()

    def offload_problem(self, on_cuda: bool | None) -> str | None:
        """Return why the engine cannot leave its devices (`offload_states`); None if it is an `OffloadableEngine`.

        Args:
            on_cuda: True if the devices are GPUs, None if not known yet.
        """
        return f"{self.strategy_name} does not implement OffloadableEngine"

    def parameters_per_device(
        self, model: str, num_devices: int, *, value_head: bool
    ) -> Sequence[DeviceParameters] | None:
        """Return what each device of a role holds, or None for even parts of the model (or if its size is unknown)."""
        return None

    def pass_memory(
        self, model: str, num_devices: int, size: PassSize, itemsize: int, *, train: bool, value_head: bool
    ) -> Sequence[PassBytes] | None:
        """Return the memory of the largest pass on each device of a role, or None if it is not known.

        Args:
            model: Hugging Face name or folder, or a `builtin:` name.
            num_devices: devices of the role.
            size: the largest micro-batch.
            itemsize: bytes of a number in the role's `dtype`.
            train: whether a backward pass follows.
            value_head: whether the model has a value head in place of the vocabulary's.
        """
        return None

    def alternatives(self, model: str, num_devices: int) -> Iterator[Alternative]:
        """Yield changes of keys after which a device may hold less. The plan proposes the cheapest that fits."""
        yield from ()


class TrainStrategyArgs(StrategyArgs):
    """An engine of `actor_train` and `critic`."""

    has_value_head: ClassVar[bool] = False
    """`build_value` exists, so that the engine can hold the critic."""
    has_float32_weights: ClassVar[bool] = False
    """Weights are float32 whatever `dtype` is. Otherwise the optimizer has a float32 copy of 16-bit weights."""

    @property
    def has_float32_gradients(self) -> bool:
        """True if gradients are float32 whatever `dtype` is."""
        return True

    supports_lora: ClassVar[bool] = False
    """The engine trains an adapter (`model_args.lora`) and scores without it: its strategy is an `AdapterStrategy`."""
    why_no_lora: ClassVar[str] = "it has no adapters"
    """Why it does not, for the error."""
    can_replay_routing: ClassVar[bool] = False
    """The engine records the experts of a mixture of experts and replays them (`router_replay`)."""

    @property
    def replay_conflicts(self) -> dict[str, str]:
        """Keys that conflict with routing replay, with their values."""
        return {}

    def value_problems(self) -> Iterator[Problem]:
        """Yield keys of `strategy_args` that have no effect on a model with a value head, for a critic."""
        yield from ()

    @abstractmethod
    def build_train(self, model: Any, optimizer: Any) -> Any:
        """Build the `TrainStrategy` of this rank.

        Args:
            model: a `ModelSetup`.
            optimizer: an `OptimizerSetup`.
        """

    def build_value(self, model: Any, optimizer: Any) -> Any:
        """Build the `ValueStrategy` of this rank; called only if `has_value_head`."""
        raise NotImplementedError(f"{self.strategy_name}: has_value_head needs build_value")

    def load_trained(self, model: Any, optimizer: Any, folder: Path) -> Any:
        """Return a `TrainedModel` with the weights of a training state, in one process, for the export.

        Args:
            model: a `ModelSetup`.
            optimizer: an `OptimizerSetup`. No optimizer step is made.
            folder: folder that `TrainStrategy.save` wrote with any layout.
        """
        strategy = self.build_train(model, optimizer)
        strategy.load(folder)
        return strategy


class ScoreStrategyArgs(StrategyArgs):
    """An engine of `reference`."""

    def scoring_problems(self) -> Iterator[Problem]:
        """Yield keys that are set although an engine that only scores does not use them."""
        yield from ()

    @abstractmethod
    def build_scorer(self, model: Any) -> Any:
        """Build the `ScoringStrategy` of this rank from a `ModelSetup`."""


class GenerateStrategyArgs(StrategyArgs):
    """An engine of `actor_infer`."""

    returns_routed_experts: ClassVar[bool] = False
    """Completions hold the experts that a mixture of experts chose (`router_replay: R3`, `record`)."""
    receives_adapters: ClassVar[bool] = False
    """The engine loads the model once and receives the trainer's adapter alone (`model_args.lora.sync: adapter`)."""
    receives_between_gpus: ClassVar[bool] = False
    """The engine can receive weights by NCCL and CUDA IPC (`weight_transfer.backend`); `build_weight_sender` exists."""

    def build_weight_sender(self, address: Any, buffer_bytes: int | None, commands: Any) -> Any:
        """Build the `NativeWeightSender` of one rank of the trainer; called only if `receives_between_gpus`.

        Args:
            address: a `WeightBroadcastAddress`, whose backend is `nccl` or `ipc`.
            buffer_bytes: size of packed buffers; None for the default.
            commands: a `CommandSender` on rank 0, None on the others.
        """
        raise NotImplementedError(f"{self.strategy_name}: receives_between_gpus needs build_weight_sender")

    def adapter_problems(self, model: str, lora: Any, on_cuda: bool | None) -> Iterator[Problem]:
        """Yield why the engine cannot receive an adapter; called only if `receives_adapters`.

        Args:
            model: Hugging Face name or folder, or a `builtin:` name.
            lora: a `LoraArgs`. Keys of problems are relative to it.
            on_cuda: True if the devices are GPUs, None if not known yet.
        """
        yield from ()

    def adapter_memory(self, model: str, lora: Any, versions: int, itemsize: int) -> float:
        """Return the bytes of all adapters on each device; called only if `receives_adapters`.

        Args:
            model: Hugging Face name or folder, or a `builtin:` name.
            lora: a `LoraArgs`.
            versions: versions that may have requests at the same time.
            itemsize: bytes of a number in the role's `dtype`.
        """
        return 0.0

    def generation_memory(
        self, model: str, weights: float, device: float, itemsize: int, sequence_length: int
    ) -> GenerationBytes | None:
        """Return what the engine takes on each of its devices besides its weights, or None if it is not known.

        Args:
            model: Hugging Face name or folder, or a `builtin:` name.
            weights: bytes of the weights on a device, and of adapters.
            device: bytes of a device.
            itemsize: bytes of a number in the role's `dtype`.
            sequence_length: longest prompt plus response in tokens.
        """
        return None

    @abstractmethod
    def build_generator(self, model: Any, generation: Any) -> Any:
        """Build the `GenerateStrategy` of one worker.

        Args:
            model: a `ModelSetup`.
            generation: a `GenerationSetup`.
        """


KindT = TypeVar("KindT", bound=StrategyArgs)


def args_class(name: Any, kind: type[KindT]) -> type[KindT]:
    """Return the class that a `strategy_name` selects for a role.

    Args:
        name: a shipped name or a user's dotted path.
        kind: base class that the role needs.

    Raises:
        ValidationError: if there is no such class, or if it is not of this kind.
    """
    known = shipped_engines(kind)
    if name in known:
        return known[name]
    if not isinstance(name, str) or "." not in name:
        context = {"expected": " or ".join(map(repr, known))}
        raise _name_error(kind, InitErrorDetails(type="literal_error", loc=("strategy_name",), input=name, ctx=context))
    try:
        found = STRATEGIES.load(name)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{STRATEGIES.kind}: {name}: ")
        raise _unusable(kind, name, f"cannot be imported ({reason}); correct the path") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise _unusable(kind, name, f"is not a subclass of {kind.__module__}.{kind.__name__}, which this role needs")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise _unusable(kind, name, f"does not define {missing}; define it as {kind.__name__} documents")
    return found


def shipped_engines(
    kind: type[KindT], able: Callable[[type[KindT]], bool] = lambda engine: True
) -> dict[str, type[KindT]]:
    """Return the classes of the shipped engines of a kind, by name; only those that are `able`, if given."""
    classes = {name: STRATEGIES.load(name) for name in STRATEGIES}
    return {name: found for name, found in classes.items() if issubclass(found, kind) and able(found)}


def _unusable(kind: type[StrategyArgs], name: str, message: str) -> ValidationError:
    error = PydanticCustomError("unusable_path", "{problem}", {"problem": f"'{name}' {message}"})
    return _name_error(kind, InitErrorDetails(type=error, loc=("strategy_name",), input=name))


def _name_error(kind: type[StrategyArgs], details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data(kind.__name__, [details])
