"""The adapter of `actor_train` in the plan (no torch)."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.lora import LoraArgs, adapter_sync
from roll_gspo.config.sft import AnyConfig
from roll_gspo.models.size import adapter_parameters, size_of
from roll_gspo.pipelines.devices import model_of

# Learning rates of reinforcement learning with all weights are about 1e-6. Adapters learn best at about ten times the
# rate of all weights (Schulman et al., "LoRA Without Regret", 2025).
LOW_RATE = 5e-6


def adapter_texts(config: AnyConfig) -> Iterator[str]:
    """Yield size, place and transfer of the adapter; nothing if all weights are trained."""
    lora = config.actor_train.model_args.lora
    if lora is None:
        return
    scale = f"alpha {lora.effective_alpha:g} / {'√' if lora.use_rslora else ''}rank"
    text = f"rank {lora.rank}, scale {scale}, on {', '.join(lora.target_modules)}"
    if lora.dropout:
        text += f", dropout {lora.dropout:g}"
    yield text + _share(config, lora)
    if isinstance(config, ExperimentConfig):
        sync, engine = adapter_sync(lora, config.actor_infer.strategy_args), config.actor_infer.strategy_args
        sent = "the adapter alone" if sync == "adapter" else "all weights, with the adapter merged into them"
        yield f"{engine.strategy_name} receives {sent}"


def _share(config: AnyConfig, lora: LoraArgs) -> str:
    """Return the trained part of the model, '' if its size is not known yet."""
    model = model_of(config, config.actor_train)
    number, size = adapter_parameters(model, lora.rank, lora.target_modules), size_of(model)
    return "" if number is None or size is None else f"; about {number / size.num_parameters:.2%} of the parameters"


def adapter_warnings(config: AnyConfig) -> Iterator[Problem]:
    """Yield a learning rate that is usual for all weights and too low for an adapter."""
    rate = config.actor_train.training_args.learning_rate
    if config.actor_train.model_args.lora is not None and rate < LOW_RATE:
        yield Problem(
            "actor_train.training_args.learning_rate",
            f"{rate:g} is usual for all weights, and an adapter learns with about ten times as much; set e.g. "
            f"{10 * rate:g}",
            ("actor_train.model_args.lora",),
        )
