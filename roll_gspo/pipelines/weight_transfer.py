"""The backend of the weight transfer that `weight_transfer.backend` selects for the devices of a run (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.devices import devices_of, model_of, ranges

Backend = Literal["gloo", "nccl", "ipc"]
_KEY = "weight_transfer.backend"


class Choice(NamedTuple):
    """A backend, and why."""

    backend: Backend
    reason: str


def transfer_choice(config: ExperimentConfig, on_cuda: bool) -> Choice:
    """Return the backend of `execution: ray`: the selected one, or that of `auto`. Adapters always use gloo.

    Args:
        config: the whole configuration.
        on_cuda: devices are GPUs.
    """
    if config.sends_adapters:
        return Choice("gloo", "an adapter is small")
    explicit, valid = config.weight_transfer.backend, dict(_valid(config, on_cuda))
    if explicit != "auto":
        return Choice(explicit, "selected")
    backend, reason = next(iter(valid.items()))
    return Choice(backend, reason)


def transfer_problems(config: ExperimentConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield a selected backend that cannot work, with the nearest one that can, and checksums that it does not have.

    If the trainer sends adapters, yield why the generation engine cannot receive them.

    Args:
        config: the whole configuration.
        on_cuda: True if devices are GPUs; None if not known yet.
    """
    selected = config.weight_transfer.backend
    if config.sends_adapters:
        yield from _adapter_problems(config, on_cuda)
    if config.weight_transfer.checksum and config.execution == "ray" and on_cuda is not None:
        backend = transfer_choice(config, on_cuda).backend
        if backend != "gloo":
            message = f"true is only for gloo, not {backend}; set it to false, or {_KEY}: gloo"
            yield Problem("weight_transfer.checksum", message, (_KEY,))
    if selected == "auto":
        return
    if config.execution == "local":
        message = (
            f"{selected} is for engines in other processes, but execution: local has one process, in which vLLM loads "
            "the trainer's tensors directly; set auto, or execution: ray"
        )
        yield Problem(_KEY, message, ("execution",))
    elif config.sends_adapters:
        return
    elif on_cuda is not None and selected not in (valid := dict(_valid(config, on_cuda))):
        nearest = next(iter(valid))
        yield Problem(_KEY, f"{selected} {_why_not(config, selected, on_cuda)}; set {nearest} ({valid[nearest]})")


def transfer_warnings(config: ExperimentConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield weights of GPUs that travel through host memory."""
    if config.execution == "local" or not on_cuda or config.sends_adapters:
        return
    backend, reason = transfer_choice(config, on_cuda)
    if backend == "gloo":
        faster = next(iter(dict(_valid(config, on_cuda))))
        fix = f"set {faster}" if faster != "gloo" else "give engines GPUs of the trainer only, or none of them"
        yield Problem(_KEY, f"gloo ({reason}) sends the weights through host memory, which is slow on GPUs; {fix}")


def transfer_text(config: ExperimentConfig, on_cuda: bool | None) -> str:
    """Return the plan's text."""
    if config.execution == "local":
        what = "the adapter, copied" if config.sends_adapters else "passed by reference"
        return f"{what} in one process"
    if config.sends_adapters:
        return "the adapter alone, by gloo through host memory"
    if on_cuda is None:
        return "on GPUs {} ({}), else {} ({})".format(*transfer_choice(config, True), *transfer_choice(config, False))
    return "{} ({})".format(*transfer_choice(config, on_cuda))


def _adapter_problems(config: ExperimentConfig, on_cuda: bool | None) -> Iterator[Problem]:
    lora, role = config.actor_train.model_args.lora, config.actor_infer
    for problem in role.strategy_args.adapter_problems(model_of(config, role), lora, on_cuda):
        key, *also = (f"actor_train.model_args.lora.{key}" for key in (problem.key, *problem.also))
        yield problem._replace(key=key, also=tuple(also))


def _valid(config: ExperimentConfig, on_cuda: bool) -> Iterator[tuple[Backend, str]]:
    """Yield the backends that work, the fastest first, each with a reason."""
    if on_cuda and config.actor_infer.strategy_args.receives_between_gpus:
        trainer, engines = devices_of(config.actor_train), devices_of(config.actor_infer)
        if set(engines) <= set(trainer):
            yield "ipc", "every engine shares its GPUs with the trainer"
        if trainer[0] not in engines:
            apart = "separate GPUs" if not set(engines) & set(trainer) else "no engine is on the GPU that sends"
            yield "nccl", apart
    yield "gloo", _why_gloo(config, on_cuda)


def _why_gloo(config: ExperimentConfig, on_cuda: bool) -> str:
    if not on_cuda:
        return "no GPUs"
    engine = config.actor_infer.strategy_args
    if not engine.receives_between_gpus:
        return f"the only one of {engine.strategy_name}"
    return "works with any layout"


def _why_not(config: ExperimentConfig, backend: str, on_cuda: bool) -> str:
    engine = config.actor_infer.strategy_args
    if not on_cuda:
        return "moves bytes between GPUs, and there are none"
    if not engine.receives_between_gpus:
        return f"is not a backend of {engine.strategy_name}"
    trainer, engines = devices_of(config.actor_train), devices_of(config.actor_infer)
    if backend == "ipc":
        alone = ranges(tuple(sorted(set(engines) - set(trainer))))
        return f"reads the trainer's memory on the same GPU, but actor_train is not on device(s) {alone}"
    return f"cannot have two members on one GPU, but device {trainer[0]}, which sends, also has an engine"
