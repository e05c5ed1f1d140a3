"""The float32 head of the engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, policy_loss, sequences, train_batch
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.strategies import head_products
from roll_gspo.strategies.head_products import float32_logits, product, uses_float32
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import load_model
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.transformers_model import compute_logits_in_float32

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "key", "expected"),
    [(BF16, None, True), (torch.float16, None, True), (BF16, False, False), (torch.float32, True, False)],
)
def test_fp32_lm_head_is_on_for_16_bits(dtype: torch.dtype, key: bool | None, expected: bool) -> None:
    assert uses_float32(dtype, key) is expected


class OnCuda(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_product_asks_cuda_for_float32_sums_of_16_bit_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append((left.dtype, right.dtype, out_dtype))
        return left.float()

    monkeypatch.setattr(torch, "mm", mm)
    factors = [torch.ones(2, 2, dtype=BF16).as_subclass(OnCuda) for _ in range(2)]
    assert product(factors[0], factors[1], True).dtype == torch.float32
    assert asked == [(BF16, BF16, torch.float32)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("block", [2**22, 5 * 12])
def test_float32_logits_and_gradients_equal_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, weight_dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(head_products, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 12, generator=generator).requires_grad_()
    weight = torch.randn(61, 12, generator=generator).to(weight_dtype).requires_grad_()
    upstream = torch.randn(2, 3, 61, generator=generator)
    with torch.autocast("cpu", BF16, enabled=autocast):
        logits = float32_logits(hidden, weight, BF16)
    found = torch.autograd.grad(logits, (hidden, weight), upstream)
    exact = [tensor.detach().to(BF16).double().requires_grad_() for tensor in (hidden, weight)]
    want = exact[0] @ exact[1].t()
    wanted = torch.autograd.grad(want, exact, upstream.to(BF16).double())
    assert logits.dtype == torch.float32 and [tensor.dtype for tensor in found] == [torch.float32, weight_dtype]
    torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        step = 1e-6 if ours.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours.double(), theirs, rtol=step, atol=1e-5)


def _deviation(scorer: HfInfer, folder: Path) -> float:
    """Return the largest deviation of the log-probs from a head in float64 on the same hidden states."""
    states: list[Tensor] = []
    model = load_model(folder, BF16, "sdpa").requires_grad_(False)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    batch = sequences()
    with torch.no_grad():
        model(input_ids=batch.input_ids)
    log_p = (states[0].double() @ model.lm_head.weight.double().t() / 0.7).log_softmax(-1)
    mask = batch.response_mask
    predicting = log_p.gather(1, batch.predicting_positions.clamp(min=0)[:, :, None].expand(-1, -1, log_p.shape[-1]))
    chosen = predicting.gather(-1, batch.response_ids[:, :, None])[..., 0]
    return float((scorer.score(batch).log_probs.double() - chosen)[mask].abs().max())


def test_hf_infer_scores_with_float32_logits_unless_the_key_is_false(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_tied")
    setup = model_setup(folder, BF16, micro_batch_size=6)  # one pass, as in the reference
    assert _deviation(HfInfer(setup, HfConfig()), folder) < 1e-5
    assert _deviation(HfInfer(setup, HfConfig(fp32_lm_head=False)), folder) > 1e-3


def test_hf_train_learns_with_float32_logits(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_untied")
    exact = HfTrain(model_setup(folder), optimizer_setup(), HfConfig())
    log_probs = exact.score(sequences()).log_probs
    norm = exact.update([train_batch()], policy_loss, entropy=True).grad_norm
    errors = []
    for key in (None, False):
        trainer = HfTrain(model_setup(folder, BF16), optimizer_setup(), HfConfig(fp32_lm_head=key))
        before = trainer.score(sequences()).log_probs
        result = trainer.update([train_batch()], policy_loss, entropy=True)
        assert result.applied and result.grad_norm == pytest.approx(norm, rel=0.05)
        assert not torch.equal(trainer.score(sequences()).log_probs, before)
        errors.append(float((before - log_probs).abs().mean()))
    assert errors[0] < errors[1]


def test_heads_that_are_no_linear_layer_are_refused(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("qwen3_untied"), torch.float32, "sdpa")
    model.set_output_embeddings(torch.nn.Sequential())
    with pytest.raises(ConfigError, match=r"fp32_lm_head: the output head .* is a Sequential.*; set false"):
        compute_logits_in_float32(model, BF16)


@pytest.mark.megatron
def test_megatron_refuses_the_triton_kernel_on_a_cpu() -> None:
    from roll_gspo.strategies.megatron.layout import layout_problems

    (problem,) = layout_problems(None, MegatronConfig(fused_head="triton"), 1, on_cuda=False)
    assert problem[:2] == ("fused_head", "triton needs CUDA; set auto, or torch")
