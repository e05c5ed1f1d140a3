"""Checkpoint -> engine -> checkpoint: exact, in checkpoint names, readable by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.base import TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig


def _engine(name: str, folder: Path) -> TrainStrategy:
    if name == "hf":
        return HfTrain(model_setup(folder), optimizer_setup(), HfConfig())
    megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
    return megatron.MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig())


ENGINES = ["hf", pytest.param("megatron", marks=pytest.mark.megatron)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine_name", ENGINES)
def test_save_hf_round_trip_is_exact(checkpoint: Checkpoints, tmp_path: Path, engine_name: str, family: str) -> None:
    source = checkpoint(family)
    _engine(engine_name, source).save_hf(tmp_path)
    want, got = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert (AutoTokenizer.from_pretrained(tmp_path).eos_token_id, (tmp_path / "generation_config.json").is_file()) == (
        1,
        True,
    )
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert reloaded.dtype == torch.float32 and not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("engine_name", ENGINES)
def test_trained_model_scores_the_same_after_save_hf(checkpoint: Checkpoints, tmp_path: Path, engine_name: str) -> None:
    engine = _engine(engine_name, checkpoint("qwen3_moe"))
    engine.update(train_batch().split(3), policy_loss, True)
    engine.save_hf(tmp_path)
    reloaded = HfInfer(model_setup(tmp_path), HfConfig()).score(sequences())
    torch.testing.assert_close(reloaded.log_probs, engine.score(sequences()).log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine_name", ENGINES)
def test_generation_engine_takes_the_trainers_weights(checkpoint: Checkpoints, engine_name: str) -> None:
    engine = _engine(engine_name, checkpoint("qwen3_moe"))
    generator = HfInfer(model_setup(checkpoint("qwen3_moe")), HfConfig())
    source = engine.weights()
    for step in (1, 2):
        engine.update(train_batch(step).split(3), policy_loss, True)
        generator.update_weights(source, step)
        want = engine.score(sequences()).log_probs
        torch.testing.assert_close(generator.score(sequences()).log_probs, want, rtol=0, atol=1e-4)
    assert generator.weights_version == 2


@pytest.mark.megatron
def test_megatron_refuses_checkpoints_that_do_not_fit_their_config(checkpoint: Checkpoints, tmp_path: Path) -> None:
    weights = load_file(checkpoint("qwen3_untied") / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint("qwen3_untied") / "config.json").read_text())
    save_file(weights | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors .*o_proj\.bias"):
        _engine("megatron", tmp_path)
    save_file(weights | {"lm_head.weight": torch.zeros(60, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*\(60, 64\).*\(61, 64\)"):
        _engine("megatron", tmp_path)
