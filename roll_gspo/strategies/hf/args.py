"""Configuration and capabilities of `hf_train` and `hf_infer` (no torch)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from roll_gspo.config.base import Problem
from roll_gspo.config.strategy import (
    GenerateStrategyArgs,
    Requirement,
    ScoreStrategyArgs,
    StrategyArgs,
    TrainStrategyArgs,
)
from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import CONFIG
from roll_gspo.models.size import model_type_of
from roll_gspo.strategies.hf.config import HfConfig

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
        """Yield nothing; any layout fits.

        Raises:
            ConfigError: the installed version of transformers does not know the model's architecture.
        """
        model_type, families = model_type_of(model), _families()
        if model_type is not None and families and not str(model_type).replace("-", "_").startswith(families):
            raise ConfigError(
                f"{model}/{CONFIG}: model_type '{model_type}' is not known to the installed transformers; correct it, "
                "or install a newer version"
            )
        yield from ()

    def _generation_problems(self) -> Iterator[Problem]:
        """Yield keys of generation that are set for an engine that never generates."""
        if self.strategy_config.generate_batch_size != HfConfig().generate_batch_size:
            message = "is used only if the engine generates (actor_infer); remove it"
            yield Problem("strategy_config.generate_batch_size", message)


def _families() -> tuple[str, ...]:
    """Return the model families of the installed transformers: the folders of its models, without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    return tuple(path.name for path in Path(spec.origin).with_name("models").glob("[a-z]*/"))


class HfTrainArgs(HfArgs, TrainStrategyArgs):
    """Train with plain transformers: the readable reference implementation."""

    has_value_head: ClassVar[bool] = True

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that only generation uses."""
        yield from super().broken_rules()
        yield from self._generation_problems()

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

    def build_scorer(self, model: ModelSetup) -> HfInfer:
        """Build an `HfInfer`."""
        from roll_gspo.strategies.hf.infer import HfInfer

        return HfInfer(model, self.strategy_config)

    def build_generator(self, model: ModelSetup, generation: GenerationSetup) -> HfInfer:
        """Build an `HfInfer`; it starts with the weights of the checkpoint and receives others either way."""
        return self.build_scorer(model)
