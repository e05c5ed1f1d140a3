"""States of somebody else: a program that is planted in any file is never run, and the error names the file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, train_batch, value_batch
from parallel_cases import squared_error
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train
from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
pytestmark = pytest.mark.megatron
SHARDS = "__0_0.distcp"


class Program:
    """Makes a folder when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._touched),)


def _torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def states(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Each engine with a state that it saved after a step."""
    setup = model_setup(checkpoint("llama")), optimizer_setup()
    engines = {
        "hf": HfTrain(*setup, HfConfig()),
        "megatron": megatron.MegatronTrain(*setup, MegatronConfig()),
        "critic": megatron.MegatronValue(*setup, MegatronConfig()),
        "fsdp2": Fsdp2Train(*setup, Fsdp2Config()),
        "fsdp2 critic": Fsdp2Value(*setup, Fsdp2Config()),
    }
    made = {}
    for name, engine in engines.items():
        critic = name.endswith("critic")
        batch, loss = (value_batch(), squared_error) if critic else (train_batch(), policy_loss)
        engine.update(batch.split(3), loss, *([] if critic else [True]))
        folder = tmp_path_factory.mktemp(name)
        engine.save(folder)
        engine.load(folder)
        made[name] = engine, folder
    return made


def _seal(state: Path) -> None:
    """Let sizes and checksums be those of the planted files."""
    manifest = state / "manifest.json"
    document = json.loads(manifest.read_text())
    for name in document["files"]:
        content = (state / name).read_bytes()
        document["files"][name] = {"size": len(content), "crc32": zlib.crc32(content)}
    manifest.write_text(json.dumps(document))


def _refused(engine: Any, state: Path, touched: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        engine.load(state)
    assert not touched.exists(), "the program ran"
    return str(caught.value)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("hf", "hf_train.pt"),
        *(
            (engine, name)
            for engine in ("megatron", "critic", "fsdp2", "fsdp2 critic")
            for name in (SHARDS, ".metadata", "common.pt", "metadata.json", "manifest.json")
            if not (engine.startswith("fsdp2") and name == "metadata.json")  # a file of megatron
        ),
    ],
)
def test_program_in_any_file_is_not_run(
    states: dict[str, tuple[Any, Path]], tmp_path: Path, engine: str, name: str, kind: str
) -> None:
    trainer, original = states[engine]
    state, touched = tmp_path / "state", tmp_path / "touched"
    shutil.copytree(original, state)
    assert set(states[engine][1].iterdir()) >= {original / name}
    program = pickle.dumps(Program(touched)) if kind == "pickle" else _torch_file({"rng": Program(touched)})
    (state / name).write_bytes(program)
    if engine != "hf":
        if name == SHARDS:
            _point_all_tensors_at_the_whole_file(state)
        if name != "manifest.json":
            _seal(state)
    assert _refused(trainer, state, touched).startswith(f"{state / name}: cannot be read (")
    pickle.loads(pickle.dumps(Program(touched)))
    assert touched.exists(), "the program does run if it is loaded"


def _point_all_tensors_at_the_whole_file(state: Path) -> None:
    index = pickle.loads((state / ".metadata").read_bytes())
    length = (state / SHARDS).stat().st_size
    for key, place in index.storage_data.items():
        index.storage_data[key] = dataclasses.replace(place, offset=0, length=length)
    (state / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
@pytest.mark.parametrize("how", ["bytes", "outside", "transform", "getattr", "no index"])
def test_crafted_index_is_refused(states: dict[str, tuple[Any, Path]], tmp_path: Path, how: str, engine: str) -> None:
    """An index without foreign classes, by which torch would unpickle freely or read another file."""
    trainer, original = states[engine]
    state, touched = tmp_path / "state", tmp_path / "touched"
    shutil.copytree(original, state)
    (state / SHARDS).write_bytes(_torch_file(Program(touched)))
    _point_all_tensors_at_the_whole_file(state)
    index: Any = pickle.loads((state / ".metadata").read_bytes())
    key = next(iter(index.storage_data))
    if how == "bytes":
        index.state_dict_metadata = {name: BytesStorageMetadata() for name in index.state_dict_metadata}
    elif how == "outside":
        index.storage_data[key] = dataclasses.replace(index.storage_data[key], relative_path="../other")
    elif how == "transform":
        index.storage_data[key] = dataclasses.replace(index.storage_data[key], transform_descriptors=["stream.zstd"])
    elif how == "getattr":
        index.planner_data = getattr
    else:
        index = {}
    (state / ".metadata").write_bytes(pickle.dumps(index))
    _seal(state)
    said = _refused(trainer, state, touched)
    assert said.startswith(f"{state / '.metadata'}: cannot be read (")
    if how == "getattr":
        assert "it refers to builtins.getattr" in said


@pytest.mark.parametrize("how", ["missing", "incomplete", "another shape"])
def test_index_that_lacks_a_part_of_a_tensor_is_refused(
    states: dict[str, tuple[Any, Path]], tmp_path: Path, how: str
) -> None:
    """Memory that no file fills would keep random values."""
    trainer, original = states["fsdp2"]
    state = tmp_path / "state"
    shutil.copytree(original, state)
    index: Any = pickle.loads((state / ".metadata").read_bytes())
    tensor = index.state_dict_metadata["exp_avg.model.norm.weight"]
    if how == "missing":
        del index.state_dict_metadata["exp_avg.model.norm.weight"]
    elif how == "incomplete":
        (chunk,) = tensor.chunks
        tensor.chunks = [dataclasses.replace(chunk, sizes=torch.Size([chunk.sizes[0] - 1]))]
    else:
        tensor.size = torch.Size([63])
    (state / ".metadata").write_bytes(pickle.dumps(index))
    _seal(state)
    before = trainer._trainer._optimizer.state_dict()
    said = _refused(trainer, state, tmp_path / "touched")
    assert said.startswith(
        f"{state}: holds no optimizer state" if how == "missing" else f"{state / '.metadata'}: cannot"
    )
    assert "'exp_avg.model.norm.weight'" in said
    after = trainer._trainer._optimizer.state_dict()
    assert all(after["state"][number] is moments for number, moments in before["state"].items()), "nothing was read"


@pytest.mark.parametrize(
    "common",
    [
        {"rng": [], "steps": {}},
        {"rng": [{"torch": torch.zeros(3, dtype=torch.uint8), "cuda": None}], "steps": {}},
        {"rng": [{"torch": torch.get_rng_state(), "cuda": None}], "steps": {"another": 1}},
        {"rng": [{"torch": torch.get_rng_state(), "cuda": None}], "steps": [1]},
        ["rng"],
    ],
    ids=["no ranks", "short state", "another parameter", "a list", "no mapping"],
)
def test_crafted_values_are_refused(states: dict[str, tuple[Any, Path]], tmp_path: Path, common: Any) -> None:
    trainer, original = states["fsdp2"]
    state = tmp_path / "state"
    shutil.copytree(original, state)
    torch.save(common, state / "common.pt")
    _seal(state)
    before = torch.get_rng_state()
    assert _refused(trainer, state, tmp_path / "touched").startswith(f"{state / 'common.pt'}: cannot be read (")
    assert torch.equal(torch.get_rng_state(), before)
