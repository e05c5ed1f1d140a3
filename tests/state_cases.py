"""What every rank of a world computes in the tests of training state."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import model_setup, policy_loss, sequences, train_batch, value_batch
from parallel_cases import OPTIMIZER, squared_error

from roll_gspo.config.strategy import MegatronConfig
from roll_gspo.errors import CheckpointError

Layout = dict[str, Any]
Figures = list[tuple[float, float, float]]
BEFORE, AFTER = range(2), range(2, 4)


def engine_of(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32, critic: bool = False) -> Any:
    from roll_gspo.strategies.megatron.engine import MegatronTrain, MegatronValue

    made = MegatronValue if critic else MegatronTrain
    return made(model_setup(folder, dtype), OPTIMIZER, MegatronConfig(**layout))


def steps(engine: Any, numbers: range, critic: bool = False) -> Figures:
    if critic:
        results = [engine.update(value_batch(number).split(2), squared_error) for number in numbers]
    else:
        results = [engine.update(train_batch(number).split(2), policy_loss, True) for number in numbers]
    assert all(result.applied for result in results)
    return [(r.loss, r.grad_norm, r.learning_rate) for r in results]


def saved(
    model: Path,
    layout: Layout,
    state: Path,
    dtype: torch.dtype = torch.float32,
    critic: bool = False,
    asynchronous: bool = False,
) -> dict[str, Any]:
    """Two steps, a save, and what happens next to a run that goes on; and that a resumed one in this layout does it."""
    engine = engine_of(model, layout, dtype, critic)
    steps(engine, BEFORE, critic)
    made(state)
    engine.save(state, asynchronous)
    draw = torch.rand(3)
    undisturbed = steps(engine, AFTER, critic)
    assert engine.finish_save()
    result = _result(engine, undisturbed, critic)
    resumed = engine_of(model, layout, dtype, critic)
    steps(resumed, range(7, 8), critic)  # a state to be overwritten
    resumed.load(state)
    assert torch.equal(torch.rand(3), draw)
    again = _result(resumed, steps(resumed, AFTER, critic), critic)
    assert again["figures"] == undisturbed
    assert again["weights"].keys() == result["weights"].keys()
    assert all(torch.equal(again["weights"][name], weight) for name, weight in result["weights"].items())
    return result


def resumed(
    model: Path, layout: Layout, state: Path, dtype: torch.dtype = torch.float32, critic: bool = False
) -> dict[str, Any]:
    """The same two steps as an undisturbed run, from a state of whatever layout."""
    engine = engine_of(model, layout, dtype, critic)
    engine.load(state)
    return _result(engine, steps(engine, AFTER, critic), critic)


def converted(model: Path, layout: Layout, state: Path, target: Path) -> None:
    """Read a state and write it again."""
    engine = engine_of(model, layout)
    engine.load(state)
    made(target)
    engine.save(target)


def whole_tensors(state: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state, by megatron's own reader."""
    from megatron.core import dist_checkpointing

    from roll_gspo.strategies.megatron.engine import MegatronTrain  # noqa: F401 - makes megatron importable

    loaded = dist_checkpointing.load_plain_tensors(str(state))
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def refused(model: Path, layout: Layout, state: Path) -> str:
    """What a load says of a state that it does not take."""
    try:
        engine_of(model, layout).load(state)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def failing_save(model: Path, layout: Layout, folder: Path, asynchronous: bool) -> tuple[str, str, Figures]:
    """A save on rank 1 of which the disk takes 20 kB, and one after it: its error, theirs, and steps in between."""
    engine = engine_of(model, layout)
    steps(engine, BEFORE)
    made(folder / "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    first = second = "saved"
    figures = []
    try:
        try:
            engine.save(folder / "first", asynchronous)
            figures = steps(engine, AFTER)
            engine.finish_save()
        except CheckpointError as error:
            first = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        made(folder / "second")
        engine.save(folder / "second", asynchronous)
        engine.finish_save()
    except CheckpointError as error:
        second = str(error)
    return first, second, figures


def timed_save(model: Path, layout: Layout, folder: Path) -> list[float]:
    """Seconds of three saves, the first of a process among them."""
    engine = engine_of(model, layout)
    steps(engine, BEFORE)
    times = []
    for number in range(3):
        made(folder / str(number))
        started = time.perf_counter()
        engine.save(folder / str(number))
        times.append(time.perf_counter() - started)
    return times


def made(folder: Path) -> None:
    """The folder, on every rank."""
    if dist.is_initialized() and dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()


def _result(engine: Any, figures: Figures, critic: bool) -> dict[str, Any]:
    if critic:
        weights = {"values": engine.values(sequences())}
    else:
        weights = {name: tensor.clone() for name, tensor in engine.weights()}
    return {"figures": figures, "weights": weights}
