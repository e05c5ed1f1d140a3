"""Low-rank adapters (LoRA): the block `model_args.lora` of `actor_train`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema
from roll_gspo.config.strategy import GenerateStrategyArgs, Requirement, TrainStrategyArgs, shipped_engines

ALL_LINEAR = "all-linear"
PEFT = Requirement("peft", "pip install 'roll-gspo[lora]'")

AdapterSync = Literal["adapter", "merged"]


class LoraArgs(Schema):
    """A low-rank adapter: the model is frozen, and two small matrices per linear layer are trained.

    A layer computes `W x + scale * B A x` with `A` of shape [rank, in] and `B` of shape [out, rank].
    """

    rank: PositiveInt
    """Rows of `A` and columns of `B`: the size of the adapter."""
    alpha: PositiveFloat | None = None
    """Scale of the adapter: `alpha / rank`; null: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an input of the adapter is set to 0 in an update. Passes without gradient have no dropout."""
    target_modules: Names = (ALL_LINEAR,)
    """Names of the linear layers with an adapter, e.g. `[q_proj, v_proj]`; `all-linear`: all but the output head."""
    use_rslora: bool = False
    """Scale the adapter by `alpha / sqrt(rank)` instead."""
    sync: AdapterSync | None = None
    """Weights that the generation engine receives: the `adapter` alone, or all of them with the adapter `merged` into
    them. null: `adapter` if the engine can receive it, else `merged`."""

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def broken_rules(self) -> Iterator[Problem]:
        """Yield target modules that name nothing or exclude each other."""
        yield from super().broken_rules()
        names = self.target_modules
        if not names or "" in names:
            yield Problem("target_modules", f"an empty name in {list(names)} selects no layer; set {ALL_LINEAR}")
        elif ALL_LINEAR in names and len(names) > 1:
            yield Problem("target_modules", f"{ALL_LINEAR} includes the other names of {list(names)}; remove them")


def broken_engine_rules(lora: LoraArgs | None, args: TrainStrategyArgs) -> Iterator[Problem]:
    """Yield an adapter of a role whose engine trains all weights only. Keys are relative to the role."""
    if lora is None or args.supports_lora:
        return
    able = " or ".join(shipped_engines(TrainStrategyArgs, lambda engine: engine.supports_lora))
    name = "strategy_args.strategy_name"
    message = f"{args.strategy_name} trains all weights: {args.why_no_lora}; set {name} to {able}, or remove lora"
    yield Problem("model_args.lora", message, (name,))


def not_trained(lora: LoraArgs | None) -> Iterator[Problem]:
    """Yield an adapter of a role other than `actor_train`. Keys are relative to the role."""
    if lora is not None:
        message = (
            "is for actor_train only (actor_infer receives its adapter, reference is the model without); remove it"
        )
        yield Problem("model_args.lora", message)


def broken_sync_rules(lora: LoraArgs | None, engine: GenerateStrategyArgs) -> Iterator[Problem]:
    """Yield an adapter for a generation engine that cannot receive it. Keys are of the whole configuration."""
    if lora is None or lora.sync != "adapter" or engine.receives_adapters:
        return
    able = " or ".join(_receivers())
    name = "actor_infer.strategy_args.strategy_name"
    message = f"adapter is not received by {engine.strategy_name}; set merged, or {name} to {able}"
    yield Problem("actor_train.model_args.lora.sync", message, (name,))


def adapter_sync(lora: LoraArgs, engine: GenerateStrategyArgs) -> AdapterSync:
    """Return what the generation engine receives."""
    return lora.sync or ("adapter" if engine.receives_adapters else "merged")


def _receivers() -> Iterable[str]:
    return shipped_engines(GenerateStrategyArgs, lambda engine: engine.receives_adapters)
