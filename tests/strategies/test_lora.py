"""Adapters of the transformers engine: values by hand, merged weights, checkpoints, dropout and files of `peft`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch
from safetensors.torch import load_file
from tiny_models import build_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.lora import Adapter
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.weight_update import ADAPTER, FULL_MODEL, kind_of

LORA = LoraSetup(rank=4, alpha=8.0)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def trainer(
    folder: Path, lora: LoraSetup = LORA, dtype: torch.dtype = torch.float32, config: HfConfig | None = None
) -> HfTrain:
    return HfTrain(lora_setup(folder, lora, dtype), optimizer_setup(), config or HfConfig())


def lora_setup(folder: Path, lora: LoraSetup = LORA, dtype: torch.dtype = torch.float32) -> ModelSetup:
    return replace(model_setup(folder, dtype), lora=lora)


def update(engine: HfTrain, *seeds: int) -> list[tuple[float, float]]:
    results = [engine.update([train_batch(seed), train_batch(seed + 1)], policy_loss, True) for seed in seeds]
    assert all(result.applied for result in results)
    return [(result.loss, result.grad_norm) for result in results]


def adapter_of(engine: HfTrain) -> dict[str, Tensor]:
    assert engine._adapter is not None
    return {name: value.detach().clone() for name, value in engine._adapter.parameters().items()}


def frozen_of(engine: HfTrain) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine._model.named_parameters() if not p.requires_grad}


def names_in(folder: Path) -> set[str]:
    """Return the names of all tensors of a checkpoint."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_one_layer_by_hand(use_rslora: bool, scale: float) -> None:
    model = build_model("qwen3_tied")
    setup = LoraSetup(rank=4, alpha=8.0, target_modules=("q_proj",), use_rslora=use_rslora)
    base = model.get_submodule(Q_PROJ).weight.detach().clone()  # type: ignore[union-attr]
    adapter = Adapter(model, setup, seed=3)
    adapter.initialize()
    first, second = (adapter.parameters()[f"base_model.model.{Q_PROJ}.lora_{kind}.weight"] for kind in "AB")
    assert first.shape == (4, 64) and second.shape == (128, 4) and not second.any()
    assert first.abs().max() <= 1 / 8 < 1.05 * first.abs().max(), "uniform within 1 / sqrt(64)"
    with torch.no_grad():
        second.copy_(torch.arange(512.0).reshape(128, 4) / 512)
    x = torch.linspace(-1, 1, 64)
    expected = base @ x + scale * (second @ (first @ x))
    layer = model.get_submodule(Q_PROJ)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    merged = dict(adapter.merged_parameters())[f"{Q_PROJ}.weight"]
    torch.testing.assert_close(merged, base + scale * second @ first, rtol=0, atol=1e-6)
    with adapter.off(), torch.no_grad():
        assert layer(x).equal(base @ x)


def test_a_seed_decides_the_initial_values(checkpoint: Checkpoints) -> None:
    torch.manual_seed(5)
    first = adapter_of(trainer(checkpoint("qwen3_tied")))
    torch.manual_seed(6)
    assert equal(first, adapter_of(trainer(checkpoint("qwen3_tied"))))
    other = HfTrain(replace(lora_setup(checkpoint("qwen3_tied")), seed=1), optimizer_setup(), HfConfig())
    assert not equal(first, adapter_of(other))


@pytest.mark.parametrize("family", ["qwen3_tied", "llama", "qwen3_moe"])
def test_training_changes_the_adapter_alone(checkpoint: Checkpoints, family: str) -> None:
    engine = trainer(checkpoint(family))
    start = engine.score(sequences())
    frozen, reference = frozen_of(engine), HfInfer(model_setup(checkpoint(family)), HfConfig())
    assert start.log_probs.equal(reference.score(sequences()).log_probs), "B is 0 at first"
    seen = [adapter_of(engine)]
    for seed in (1, 3, 5):
        update(engine, seed)
        seen.append(adapter_of(engine))
        for name, value in seen[-1].items():
            assert ("lora_A" in name and seed == 1) or not value.equal(seen[-2][name]), name
    assert equal(frozen, frozen_of(engine))
    assert engine.score_base(sequences()).log_probs.equal(start.log_probs)
    moved = engine.score(sequences()).log_probs
    assert (moved - start.log_probs).abs().max() > 0.01
    assert all(p.grad is None for p in engine._model.parameters())
    moments = [m for state in engine._trainer._optimizer.state.values() for m in state.values() if m.dim()]
    assert sum(m.numel() for m in moments) == 2 * sum(value.numel() for value in seen[0].values())


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_merged_weights_are_the_model_with_the_adapter(checkpoint: Checkpoints, family: str) -> None:
    engine = trainer(checkpoint(family), replace(LORA, use_rslora=True))
    update(engine, 1, 3)
    assert kind_of(engine.weights()) == FULL_MODEL
    receiver = HfInfer(model_setup(checkpoint(family)), HfConfig())
    receiver.update_weights(engine.weights(), 1)
    torch.testing.assert_close(
        receiver.score(sequences()).log_probs, engine.score(sequences()).log_probs, rtol=0, atol=1e-5
    )


def test_an_engine_may_receive_the_adapter_alone(checkpoint: Checkpoints) -> None:
    engine = trainer(checkpoint("qwen3_tied"), replace(LORA, sync="adapter"))
    update(engine, 1)
    source = engine.weights()
    assert kind_of(source) == ADAPTER and equal(dict(source), adapter_of(engine))


def test_a_frozen_model_in_bfloat16(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_tied")
    engine, reference = (
        trainer(folder, dtype=torch.bfloat16),
        HfInfer(model_setup(folder, torch.bfloat16), HfConfig()),
    )
    assert {p.dtype for p in frozen_of(engine).values()} == {torch.bfloat16}
    update(engine, 1)
    assert {p.dtype for p in adapter_of(engine).values()} == {torch.float32}
    exact = reference.score(sequences()).log_probs
    torch.testing.assert_close(engine.score_base(sequences()).log_probs, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_resuming_is_bitwise(checkpoint: Checkpoints, tmp_path: Path, dropout: float, asynchronous: bool) -> None:
    lora = replace(LORA, dropout=dropout)
    engine = trainer(checkpoint("qwen3_tied"), lora)
    update(engine, 1)
    engine.save(tmp_path, asynchronous)
    engine.finish_save()
    expected = update(engine, 3, 5)
    torch.manual_seed(99)
    again = trainer(checkpoint("qwen3_tied"), lora)
    again.load(tmp_path)
    assert update(again, 3, 5) == expected and equal(adapter_of(again), adapter_of(engine))
    state = torch.load(tmp_path / "hf_train.pt", weights_only=True)
    assert all(".lora_" in name for name in state["parameters"]), "the frozen model is not saved"


@pytest.mark.parametrize(
    ("saved", "loaded", "values"),
    [
        (LORA, replace(LORA, rank=8), ("rank", "4", "8")),
        (LORA, replace(LORA, alpha=4.0), ("alpha", "8", "4")),
        (LORA, replace(LORA, use_rslora=True), ("use_rslora", "false", "true")),
        (LORA, replace(LORA, target_modules=("q_proj",)), ("target_modules",)),
        (LORA, None, ("rank=4", "alpha=8")),
        (None, LORA, ("all weights", "4")),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, saved: LoraSetup | None, loaded: LoraSetup | None, values: tuple[str, ...]
) -> None:
    def engine(lora: LoraSetup | None) -> HfTrain:
        setup = replace(model_setup(checkpoint("qwen3_tied")), lora=lora)
        return HfTrain(setup, optimizer_setup(), HfConfig())

    engine(saved).save(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        engine(loaded).load(tmp_path)
    assert all(value in str(caught.value) for value in (*values, "actor_train.model_args.lora"))


def test_dropout_acts_in_updates_only(checkpoint: Checkpoints) -> None:
    folder, dropped = checkpoint("qwen3_tied"), replace(LORA, dropout=0.5)
    engines = trainer(folder), trainer(folder, dropped), trainer(folder, dropped)
    state = torch.get_rng_state()
    plain, first, second = (update(engine, 1, 3) for engine in engines)
    assert first == second and first[0][0] == plain[0][0] and first[1] != plain[1]
    assert torch.get_rng_state().equal(state), "random numbers of others are not consumed"
    scores = [engine.score(sequences()).log_probs for engine in engines]
    assert scores[1].equal(scores[2]) and scores[1].equal(engines[1].score(sequences()).log_probs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_layers_drop_the_same_inputs(checkpoint: Checkpoints, dropout: float) -> None:
    found = []
    for config in (HfConfig(), HfConfig(gradient_checkpointing=True)):
        engine = trainer(checkpoint("qwen3_tied"), replace(LORA, dropout=dropout), config=config)
        found.append((update(engine, 1, 3, 5), adapter_of(engine)))
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1])


def test_peft_loads_the_exported_adapter(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_tied")
    engine = trainer(folder, replace(LORA, target_modules=("q_proj", "down_proj"), use_rslora=True))
    update(engine, 1, 3)
    engine.save_hf(tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder) and settings["r"] == 4
    assert sorted(settings["target_modules"]) == ["down_proj", "q_proj"]
    tokens = sequences().input_ids
    with torch.no_grad():
        own = engine._model(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert loaded(input_ids=tokens).logits.equal(own)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(merged(input_ids=tokens).logits, own, rtol=0, atol=1e-5)
    assert names_in(tmp_path) == names_in(folder)


def test_a_module_that_does_not_exist(checkpoint: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="target_modules") as caught:
        trainer(checkpoint("qwen3_tied"), replace(LORA, target_modules=("q_proj", "fc1")))
    assert all(name in str(caught.value) for name in ("'fc1'", "up_proj", "all-linear"))


def test_every_linear_layer_but_the_head_has_an_adapter(checkpoint: Checkpoints) -> None:
    engine = trainer(checkpoint("qwen3_untied"))
    trained = {name for name, p in engine._model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
