"""Every family of the table against transformers: scores, gradients, weights both ways, and states of other layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch, weights_of
from safetensors.torch import load_file
from tiny_models import WIDER, WINDOW
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from roll_gspo.models.architecture import Architecture
from roll_gspo.models.size import size_of
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.layout import parameters_of_rank

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
pytestmark = pytest.mark.megatron

# one step along the gradient itself, so that the weights then show every element of it
ALONG_THE_GRADIENT = optimizer_setup(
    learning_rate=1.0, epsilon=1.0, warmup_steps=0, max_grad_norm=0.0, weight_decay=0.0, lr_scheduler_type="constant"
)


@pytest.mark.parametrize("family", WIDER)
def test_scores_equal_transformers(checkpoint: Checkpoints, family: str) -> None:
    setup = model_setup(checkpoint(family))
    want = HfInfer(setup, HfConfig()).score(sequences(), entropy=True)
    assert float(want.log_probs.min()) < -1
    for packed in (False, True):
        engine = megatron.MegatronInfer(setup, MegatronConfig(use_sequence_packing=packed))
        got = engine.score(sequences(), entropy=True)
        torch.testing.assert_close(got.log_probs, want.log_probs, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", WIDER)
def test_gradients_equal_transformers(checkpoint: Checkpoints, tmp_path: Path, family: str) -> None:
    folder = checkpoint(family)
    want = HfTrain(model_setup(folder), ALONG_THE_GRADIENT, HfConfig())
    got = megatron.MegatronTrain(model_setup(folder), ALONG_THE_GRADIENT, MegatronConfig())
    results = [engine.update(train_batch().split(2), policy_loss, True) for engine in (want, got)]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
    want._model.save_pretrained(tmp_path)  # under the names of checkpoints
    start, expected = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    found = weights_of(got)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = (weight - start[name]).norm()
        assert moved > 1e-3 and (found[name] - weight).norm() < 1e-4 * moved, name


@pytest.mark.parametrize("family", WIDER)
def test_weights_come_back_bit_for_bit(checkpoint: Checkpoints, tmp_path: Path, family: str) -> None:
    source = checkpoint(family)
    engine = megatron.MegatronTrain(model_setup(source), optimizer_setup(), MegatronConfig())
    engine.save_hf(tmp_path)
    want, got, pushed = (
        *(load_file(folder / "model.safetensors") for folder in (source, tmp_path)),
        weights_of(engine),
    )
    assert got.keys() == want.keys() == pushed.keys()
    assert all(torch.equal(got[name], want[name]) and torch.equal(pushed[name], want[name]) for name in want)
    again = megatron.MegatronInfer(model_setup(tmp_path), MegatronConfig()).score(sequences())
    assert torch.equal(again.log_probs, engine.score(sequences()).log_probs)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_decoder_of_a_model_with_images_is_trained_and_the_rest_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 50, "boi_token_index": 51, "eoi_token_index": 52}
    vision = small | {"image_size": 28, "patch_size": 14}
    text = WIDER["gemma3"][1].to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(source)
    want = HfInfer(model_setup(source), HfConfig()).score(sequences()).log_probs
    engine = megatron.MegatronTrain(model_setup(source), optimizer_setup(), MegatronConfig())
    torch.testing.assert_close(engine.score(sequences()).log_probs, want, rtol=0, atol=1e-4)
    engine.save_hf(target)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert any(name.startswith("vision_tower.") for name in after)


@pytest.mark.parametrize("family", ["mistral_window", "gemma3", "phi3", "qwen3_window"])
def test_windows_change_the_scores(checkpoint: Checkpoints, tmp_path: Path, family: str) -> None:
    copied = shutil.copytree(checkpoint(family), tmp_path / family)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"sliding_window": 256}))
    wide, narrow = (
        megatron.MegatronInfer(model_setup(folder), MegatronConfig()).score(sequences()).log_probs
        for folder in (copied, checkpoint(family))
    )
    change = (wide - narrow).abs()[2]  # a prompt of one token, so that column t is predicted at position t
    assert change[:WINDOW].max() < 1e-4 and change[WINDOW:].max() > 1e-2


@pytest.mark.parametrize("family", WIDER)
def test_parameters_are_counted_as_transformers_counts_them(checkpoint: Checkpoints, family: str) -> None:
    model_class, config = WIDER[family]
    with torch.device("meta"):
        model = model_class(config)
    size, architecture = size_of(str(checkpoint(family))), Architecture.from_checkpoint(checkpoint(family))
    assert size is not None
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    alone = parameters_of_rank(architecture, MegatronConfig(), 0)
    assert (alone.total, alone.experts) == (size.num_parameters, size.num_expert_parameters)
    assert bool(size.num_expert_parameters) == (family == "mixtral")
