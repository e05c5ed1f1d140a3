"""Fused kernels of megatron: which are chosen, that they compute the same, and what TransformerEngine gets."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
pytestmark = pytest.mark.megatron

QWEN3 = Architecture("qwen3", 4, 24, 20, 6, 2, 8, 13, 64, 1e-6, 1e4, False, None)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Install a stand-in of apex's extension, and return the shapes of the gradients that it adds up."""
    from megatron.core.tensor_parallel import layers

    added: list[torch.Size] = []

    def accumulate(inputs: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        added.append(buffer.shape)
        buffer.add_(gradient.t() @ inputs)

    stand_in = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", stand_in, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    return added


def on_gpus(monkeypatch: pytest.MonkeyPatch, engine: bool) -> None:
    from roll_gspo.strategies.megatron.engine import attention, transformer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (attention, transformer):
        monkeypatch.setattr(module, "HAVE_TE", engine)


def updated(folder: Any, **config: Any) -> tuple[list[float], dict[str, Tensor]]:
    engine = megatron.MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig(**config))
    results = [engine.update(train_batch(step).split(2), policy_loss, True) for step in range(2)]
    return [x for r in results for x in (r.loss, r.grad_norm)], {n: t.clone() for n, t in engine.weights()}


def check_same(folder: Any, **config: Any) -> None:
    (numbers, weights), (want, expected) = updated(folder, **config), updated(folder)
    assert numbers == pytest.approx(want, rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_fused_activations_and_residuals_compute_the_same(checkpoint: Checkpoints, family: str) -> None:
    check_same(checkpoint(family), bias_activation_fusion=True, bias_dropout_fusion=True)


def test_gradients_are_added_inside_the_matrix_product(checkpoint: Checkpoints, extension: list[torch.Size]) -> None:
    from roll_gspo.strategies.megatron.engine import transformer

    folder = checkpoint("qwen3_untied")
    architecture = Architecture.from_checkpoint(folder)
    config = transformer.transformer_config(
        architecture, torch.float32, MegatronConfig(gradient_accumulation_fusion=True)
    )
    assert config.gradient_accumulation_fusion
    engine = megatron.MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig())
    for chunk in engine._model.chunks:
        for module in chunk.modules():
            if "gradient_accumulation_fusion" in vars(module):
                vars(module)["gradient_accumulation_fusion"] = True
    result = engine.update(train_batch().split(2), policy_loss, True)
    plain = megatron.MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig())
    want = plain.update(train_batch().split(2), policy_loss, True)
    assert (result.loss, result.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=1e-5)
    assert len(added := extension) == 3 * 4 * architecture.num_layers, "qkv, projection and both of the MLP, per pass"
    assert torch.Size([architecture.hidden_size, architecture.intermediate_size]) in added


@pytest.mark.parametrize("engine", [False, True])
def test_null_chooses_kernels_by_device_and_packages(
    monkeypatch: pytest.MonkeyPatch, extension: list[torch.Size], engine: bool
) -> None:
    from roll_gspo.strategies.megatron.engine.transformer import _kernels

    assert not any(_kernels(QWEN3, MegatronConfig()).values())
    on_gpus(monkeypatch, engine)
    assert _kernels(QWEN3, MegatronConfig()) == {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "apply_rope_fusion": engine,
        "gradient_accumulation_fusion": True,
    }
    assert not _kernels(QWEN3, MegatronConfig(bias_activation_fusion=False))["bias_activation_fusion"]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"apply_rope_fusion": True}, "apply_rope_fusion: true needs TransformerEngine"),
        ({"gradient_accumulation_fusion": True}, "fused_weight_gradient_mlp_cuda, which is not installed"),
        ({"moe_token_dispatcher_type": "flex"}, "flex needs DeepEP"),
    ],
)
def test_missing_packages_are_refused_on_gpus(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoints, config: dict[str, Any], text: str
) -> None:
    from roll_gspo.strategies.megatron.engine.transformer import refuse_layout

    on_gpus(monkeypatch, engine=False)
    with pytest.raises(ConfigError, match=text):
        refuse_layout(MegatronConfig(**config), Architecture.from_checkpoint(checkpoint("qwen3_moe")))


def test_transformer_engine_gets_packed_samples_in_its_format(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoints
) -> None:
    """The layer of TransformerEngine reads the fields of megatron's `PackedSeqParams`."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from roll_gspo.strategies.megatron.engine import model as model_module
    from roll_gspo.strategies.megatron.engine.rotary import LayerRotary

    engine = megatron.MegatronInfer(model_setup(checkpoint("qwen3_tied")), MegatronConfig(use_sequence_packing=True))
    model = engine._model
    assert isinstance(model.chunks[0].rotary_pos_emb, LayerRotary)
    monkeypatch.setattr(model_module, "uses_transformer_engine", lambda: True)
    packed = model.micro_batch(sequences(), None).packed_layout.packed
    given = {field.name: vars(packed)[field.name] for field in fields(PackedSeqParams)}
    lengths = sequences().lengths
    assert given["qkv_format"] == "thd" and given["max_seqlen_q"] == given["max_seqlen_kv"] == int(lengths.max())
    for key in ("cu_seqlens_q", "cu_seqlens_kv"):
        assert given[key].dtype == torch.int32
        assert given[key].tolist() == [0, *lengths.cumsum(0).tolist()]


def test_transformer_engine_computes_the_layers_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from roll_gspo.strategies.megatron.engine import attention

    asked: list[dict[str, Any]] = []
    spec = attention.get_gpt_layer_local_spec()
    monkeypatch.setattr(
        attention, "get_gpt_layer_with_transformer_engine_spec", lambda **given: asked.append(given) or spec
    )
    on_gpus(monkeypatch, engine=True)
    config: Any = SimpleNamespace(num_moe_experts=8, moe_grouped_gemm=True, qk_layernorm=True)
    assert attention.decoder_spec(QWEN3, config) is spec
    assert asked == [{"num_experts": 8, "moe_grouped_gemm": True, "qk_layernorm": True}]
