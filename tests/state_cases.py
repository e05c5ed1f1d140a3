"""Functions that every rank of a world runs in the tests of training state."""

from __future__ import annotations

import gc
import resource
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import model_setup, policy_loss, sequences, train_batch, value_batch
from parallel_cases import OPTIMIZER, squared_error
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.micro_batches import MicroBatching
from roll_gspo.strategies.residency import Residency

Layout = dict[str, Any]
UpdateNumbers = list[tuple[float, float, float]]
BEFORE, AFTER = range(2), range(2, 4)


def engine_of(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32, critic: bool = False) -> Any:
    """Build an engine: that of the key `engine` of the layout, megatron's by default."""
    options = dict(layout)
    if options.pop("engine", "megatron") == "fsdp2":
        from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train
        from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value

        sharded = Fsdp2Value if critic else Fsdp2Train
        return sharded(model_setup(folder, dtype), OPTIMIZER, Fsdp2Config(**options))
    from roll_gspo.strategies.megatron.engine import MegatronTrain, MegatronValue

    made = MegatronValue if critic else MegatronTrain
    return made(model_setup(folder, dtype), OPTIMIZER, MegatronConfig(**options))


def steps(engine: Any, numbers: range, critic: bool = False) -> UpdateNumbers:
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
    """Take two steps, save, and return the next results; check that a resumed run gives the same."""
    engine = engine_of(model, layout, dtype, critic)
    steps(engine, BEFORE, critic)
    made(state)
    engine.save(state, asynchronous)
    draw = torch.rand(3)
    undisturbed = steps(engine, AFTER, critic)
    assert engine.finish_save()
    result = _result(engine, undisturbed, critic)
    resumed = engine_of(model, layout, dtype, critic)
    steps(resumed, range(7, 8), critic)  # a state that `load` overwrites
    resumed.load(state)
    assert torch.equal(torch.rand(3), draw)
    again = _result(resumed, steps(resumed, AFTER, critic), critic)
    assert again["updates"] == undisturbed
    assert again["weights"].keys() == result["weights"].keys()
    assert all(torch.equal(again["weights"][name], weight) for name, weight in result["weights"].items())
    return result


def resumed(
    model: Path, layout: Layout, state: Path, dtype: torch.dtype = torch.float32, critic: bool = False
) -> dict[str, Any]:
    """Load a state of any layout and take the two steps of an uninterrupted run."""
    engine = engine_of(model, layout, dtype, critic)
    engine.load(state)
    return _result(engine, steps(engine, AFTER, critic), critic)


def converted(model: Path, layout: Layout, state: Path, target: Path) -> None:
    """Load a state and save it again."""
    engine = engine_of(model, layout)
    engine.load(state)
    made(target)
    engine.save(target)


def whole_tensors(state: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a state with megatron's reader."""
    import_module("roll_gspo.strategies.megatron.engine")  # makes megatron importable
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(state))
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def moved(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> list[bool]:
    """Train twice, once with moves to the host before each call; return whether scores, steps and weights are equal."""
    stays, moves = (engine_of(folder, layout, dtype) for _ in range(2))
    equal = []
    for step in range(2):
        moves.reside(Residency.OFFLOADED)
        moves.reside(Residency.WEIGHTS)
        equal.append(torch.equal(moves.score(sequences()).log_probs, stays.score(sequences()).log_probs))
        moves.reside(Residency.FULL)
        results = [
            engine.update(MicroBatching(2).split(train_batch(step)), policy_loss, True) for engine in (stays, moves)
        ]
        equal.append(results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm)
    moves.reside(Residency.WEIGHTS)
    pairs = zip(stays.weights(), moves.weights(), strict=True)
    return [*equal, all(torch.equal(one, other) for (_, one), (_, other) in pairs)]


def left(folder: Path, layout: Layout) -> dict[str, float]:
    """Return the bytes of all tensors of this process at each residency, per byte of this rank's part of the model.

    Copies on the host do not count. Updates, scores and exports have used gathered parameters before.
    """
    before = _bytes_of_tensors()
    engine = engine_of(folder, layout)
    steps(engine, BEFORE)
    engine.score(sequences())
    part = sum(tensor.nbytes for tensor in engine._state._parts[0][1]._tensors())
    assert sum(weight.nbytes for _, weight in engine.weights()) > part
    found = {}
    for residency in (Residency.FULL, Residency.WEIGHTS, Residency.OFFLOADED):
        engine.reside(residency)
        copies = sum(len(chunk) for _, moving in engine._state._parts for chunk in moving._chunks)
        found[residency.name] = (_bytes_of_tensors() - before - copies) / part
    return found


def _bytes_of_tensors() -> int:
    """Return the size of the memory behind all tensors that are alive."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = (found._local_tensor if isinstance(found, DTensor) else found).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def tensors_by_torch(state: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a state with torch's converter."""
    dcp_to_torch_save(state, folder / "tensors.pt")
    return torch.load(folder / "tensors.pt", weights_only=True)


def refused(model: Path, layout: Layout, state: Path) -> str:
    """Return the error of a load that must fail."""
    try:
        engine_of(model, layout).load(state)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def unchanged_by_refusal(model: Path, layout: Layout, state: Path, undisturbed: Path) -> str:
    """Return the error of a load that must fail; check that the engine then continues as without it."""
    engine = engine_of(model, layout)
    engine.load(undisturbed)
    want = steps(engine, AFTER)
    engine.load(undisturbed)
    try:
        engine.load(state)
    except CheckpointError as error:
        assert steps(engine, AFTER) == want
        return str(error)
    return "loaded"


def failing_save(model: Path, layout: Layout, folder: Path, asynchronous: bool) -> tuple[str, str, UpdateNumbers]:
    """Fail a save on rank 1 at 20 kB, then save again; return the errors and the steps in between."""
    engine = engine_of(model, layout)
    steps(engine, BEFORE)
    made(folder / "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    first = second = "saved"
    numbers = []
    try:
        try:
            engine.save(folder / "first", asynchronous)
            numbers = steps(engine, AFTER)
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
    return first, second, numbers


def timed_save(model: Path, layout: Layout, folder: Path) -> list[float]:
    """Return the seconds of three saves, including the first one of the process."""
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
    """Broadcast the folder to every rank."""
    if dist.is_initialized() and dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()


def _result(engine: Any, numbers: UpdateNumbers, critic: bool) -> dict[str, Any]:
    if critic:
        weights = {"values": engine.values(sequences())}
    else:
        weights = {name: tensor.clone() for name, tensor in engine.weights()}
    return {"updates": numbers, "weights": weights}
