"""Megatron states: rejected states, readers, and the split of parameters into boxes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.megatron.config import MegatronConfig

pytestmark = pytest.mark.megatron


def engine_of(folder: Path, **config: Any) -> Any:
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    return MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig(**config))


@pytest.fixture
def state(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """State of `llama` after a step."""
    folder = tmp_path / "state"
    folder.mkdir()
    engine = engine_of(checkpoint("llama"))
    engine.update(train_batch().split(3), policy_loss, True)
    engine.save(folder)
    return folder


def refusal(model: Path, state: Path) -> str:
    engine = engine_of(model)
    before = engine.score(sequences()).log_probs
    with pytest.raises(CheckpointError) as caught:
        engine.load(state)
    assert torch.equal(engine.score(sequences()).log_probs, before), "nothing was read"
    return str(caught.value)


def test_state_of_another_model_is_refused_by_name_and_shape(checkpoint: Checkpoints, state: Path) -> None:
    said = refusal(checkpoint("qwen3_untied"), state)
    assert "parameters of another model ('decoder.layers.0.self_attention.q_layernorm.weight' has shape (16,)" in said
    assert "the state does not hold it); use the configuration that wrote it" in said
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["tensors"]["decoder.layers.1.mlp.linear_fc2.weight"] = [64, 256]
    (state / "manifest.json").write_text(json.dumps(manifest))
    said = refusal(checkpoint("llama"), state)
    assert "'decoder.layers.1.mlp.linear_fc2.weight' has shape (64, 128) in the model, the state has shape" in said


def test_state_with_more_layers_than_the_model_is_refused(checkpoint: Checkpoints, tmp_path: Path, state: Path) -> None:
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    engine_of(checkpoint("four_layers")).save(deeper)
    assert "parameters of another model" in refusal(checkpoint("llama"), deeper)
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["tensors"]["decoder.layers.2.mlp.linear_fc2.weight"] = [64, 128]
    (state / "manifest.json").write_text(json.dumps(manifest))
    assert "the model has no 'decoder.layers.2.mlp.linear_fc2.weight'" in refusal(checkpoint("llama"), state)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_damaged_file_is_named(checkpoint: Checkpoints, state: Path, name: str, damage: str) -> None:
    file = state / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
        wanted = f"{file}: cannot be read (No such file or directory)"
    elif damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
        wanted = f"{file}: has {len(content) // 2} bytes, {len(content)} were written; it is cut short"
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        wanted = f"{file}: its checksum is not the one that was written"
    assert refusal(checkpoint("llama"), state).startswith(wanted)


def test_torn_manifest_is_refused(checkpoint: Checkpoints, state: Path) -> None:
    manifest = state / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    assert refusal(checkpoint("llama"), state).startswith(f"{manifest}: cannot be read")
    manifest.unlink()
    assert refusal(checkpoint("llama"), state).startswith(f"{manifest}: no such file; the checkpoint is of another")


def test_newer_and_earlier_formats_are_refused(checkpoint: Checkpoints, state: Path) -> None:
    manifest = state / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"format": document["format"] + 1, "all": "else may differ"}))
    said = refusal(checkpoint("llama"), state)
    assert said.startswith(f"{manifest}: format 3 is not known here (this version reads 2); a newer roll_gspo wrote")
    manifest.unlink()
    torch.save({}, state / "rank_000.pt")
    assert "rank_000.pt: written by an earlier version of roll_gspo" in refusal(checkpoint("llama"), state)


def test_state_without_optimizer_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Weights of no step, which say that they are of three."""
    engine_of(checkpoint("llama")).save(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"applied_steps": 0', '"applied_steps": 3'))
    said = refusal(checkpoint("llama"), tmp_path)
    assert said.startswith(f"{tmp_path}: holds no optimizer state ('exp_avg.embedding.word_embeddings.weight'")


def test_state_of_no_step_forgets_the_steps_of_the_engine(checkpoint: Checkpoints, tmp_path: Path) -> None:
    first, second = engine_of(checkpoint("llama")), engine_of(checkpoint("llama"))
    first.save(tmp_path)
    second.update(train_batch().split(3), policy_loss, True)
    second.load(tmp_path)
    batches = train_batch(2).split(3)
    mine, other = (engine.update(batches, policy_loss, True) for engine in (first, second))
    assert (mine.loss, mine.grad_norm, mine.learning_rate) == (other.loss, other.grad_norm, other.learning_rate)
    assert torch.equal(first.score(sequences()).log_probs, second.score(sequences()).log_probs)


def test_state_is_whole_float32_tensors_by_names_of_one_rank(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Read with megatron's own reader; the vocabulary without padding."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain  # first, for it makes megatron importable here

    assert MegatronTrain
    from megatron.core import dist_checkpointing

    engine = engine_of(checkpoint("qwen3_moe"))
    engine.update(train_batch().split(3), policy_loss, True)
    engine.save(tmp_path)
    tensors = dist_checkpointing.load_plain_tensors(str(tmp_path))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    shapes = {
        "embedding.word_embeddings.weight": (61, 64),
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight": (2, 32, 64),
        "decoder.layers.0.self_attention.linear_qkv.weight": (128, 64),
    }
    for kind in kinds:
        for name, shape in shapes.items():
            tensor = tensors[f"{kind}.{name}"]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.float32)
    names = {name.partition(".")[2] for name in tensors if name.startswith("weight.")}
    assert {name for name in tensors if name.startswith(kinds)} == {
        f"{kind}.{name}" for kind in kinds for name in names
    }


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("decoder.layers.3.mlp.experts.linear_fc1.weight12", "experts.local_experts.12.linear_fc1.weight"),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
    ],
)
def test_fused_modules_have_the_names_of_plain_ones(name: str, same: str) -> None:
    """Both are made of the same Hugging Face weights."""
    from roll_gspo.models.architecture import Architecture
    from roll_gspo.models.weight_mapping import recipe
    from roll_gspo.strategies.megatron.engine.state import _canonical

    assert _canonical(name).endswith(same)
    model = Architecture(
        "qwen3_moe" if "experts" in name else "qwen3", 4, 24, 20, 6, 2, 8, 13, 64, 1e-6, 1e4, False, None
    )
    assert recipe(_canonical(name), model) == recipe(name, model)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5, 1)])
def test_boxes_are_the_elements_in_order(shape: tuple[int, ...]) -> None:
    from roll_gspo.strategies.megatron.engine.state import _boxes

    numel = math.prod(shape)
    whole = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            boxes = list(_boxes(shape, start, stop))
            parts = [whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1) for box in boxes]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, stop))
            assert len(boxes) <= 2 * len(shape) - 1
