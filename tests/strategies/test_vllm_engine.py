"""The vLLM engine against transformers on the same weights, after every kind of weight update."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import model_setup, optimizer_setup, policy_loss, train_batch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, FAMILIES, VOCAB, write_model
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from roll_gspo.batch import Completion, Sequences
from roll_gspo.errors import ConfigError, DataError, WeightTransferError
from roll_gspo.strategies.base import ModelSetup, Sampling, TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.vllm.args import cpu_head_sizes
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.engine.generate import VllmGenerate, _engine_args

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 256
PROMPTS = [[3, 5 + i, 9, 40 + i, 7] for i in range(6)] + [[3 + (i * 7) % 50 for i in range(90)]]
SEEDS = [100 * i for i in range(len(PROMPTS))]
TOLERANCE = {"qwen2": 1e-4, "qwen3_tied": 1e-4, "llama": 1e-4, "qwen3_moe": 1e-3}


def _save_model(family: str, folder: Path) -> None:
    model_class, config = FAMILIES[family]
    config = copy.deepcopy(config)
    # vLLM's CPU attention starts at heads of 32.
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    model_class(config).save_pretrained(folder)


class Weights:
    """A `WeightSource` over named tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


class Tiny:
    """One engine and the folder of its model."""

    def __init__(self, folder: Path, engine: VllmGenerate) -> None:
        self.folder, self.engine = folder, engine

    def weights(self, seed: int) -> dict[str, Tensor]:
        """Random weights under the names of the checkpoint, wide enough for peaked distributions."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, old in load_file(self.folder / "model.safetensors").items():
            noise = torch.randn(old.shape, generator=generator)
            drawn[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.2 * noise
        return drawn

    def reference(self, weights: dict[str, Tensor], tmp_path: Path) -> PreTrainedModel:
        """The same weights in transformers."""
        shutil.copytree(self.folder, tmp_path, dirs_exist_ok=True)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


def _build(folder: Path, **config: object) -> VllmGenerate:
    setup = ModelSetup(folder, torch.float32, micro_batch_size=1, temperature=1.0, seed=0)
    return VllmGenerate(setup, VllmConfig(max_num_seqs=32, kv_cache_memory_mb=32, **config), MAX_MODEL_LEN)


@torch.no_grad()
def _log_prob_error(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
    temperature: float = 1.0,
) -> float:
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            response = torch.tensor(completion.token_ids)
            logits = model(torch.cat([torch.tensor(prompt), response])[None]).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / temperature, -1).gather(1, response[:, None])[:, 0]
            worst = max(worst, float((expected - torch.tensor(completion.log_probs)).abs().max()))
    return worst


@pytest.fixture(scope="module")
def process_group() -> None:
    """A trainer's process group, there before the engines are; megatron's groups in it outlive this module."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Iterator[Callable[[str], Tiny]]:
    """One engine a kind, on dummy weights until a test transfers others."""
    built: dict[str, Tiny] = {}

    def get(kind: str) -> Tiny:
        if kind not in built:
            folder = tmp_path_factory.mktemp(kind)
            _save_model(kind, folder)
            built[kind] = Tiny(folder, _build(folder))
        return built[kind]

    yield get
    for item in built.values():
        item.engine.shutdown()


@pytest.fixture
def dense(tiny: Callable[[str], Tiny]) -> Tiny:
    """The tied dense model with the weights of seed 1."""
    item = tiny("qwen3_tied")
    item.engine.update_weights(Weights(item.weights(1)), 1)
    return item


def test_engine_without_process_group_keeps_random_state_and_threads(tmp_path: Path) -> None:
    if dist.is_initialized():
        pytest.skip("torch.distributed is initialised already")
    _save_model("qwen3_tied", tmp_path)
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    set_num_threads = torch.set_num_threads
    engine = _build(tmp_path, load_format="auto")
    engine.generate(PROMPTS, Sampling(2, 8), SEEDS)
    engine.update_weights(Weights(load_file(tmp_path / "model.safetensors")), 1)
    engine.shutdown()
    engine.shutdown()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert torch.set_num_threads is set_num_threads
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.generate(PROMPTS, Sampling(1, 1), SEEDS)


def test_dummy_weights_generate_nothing_and_the_trainers_process_group_stays(
    tmp_path: Path, process_group: None
) -> None:
    _save_model("llama", tmp_path)
    engine = _build(tmp_path)
    with pytest.raises(WeightTransferError, match="no weights were transferred yet"):
        engine.generate(PROMPTS, Sampling(1, 1), SEEDS)
    engine.shutdown()
    _assert_process_group_works()


def test_long_prompts_that_do_not_fit_into_one_engine_step_are_sampled_with_their_seeds(dense: Tiny) -> None:
    # Cut into chunks, a seeded prompt would end vLLM on a CPU: see `_engine_args`.
    engine = _build(dense.folder, max_num_batched_tokens=MAX_MODEL_LEN)
    try:
        engine.update_weights(Weights(dense.weights(3)), 1)
        prompts = [[3 + (i * n) % 50 for n in range(150)] for i in range(1, 6)]
        sampling = Sampling(num_samples=2, max_new_tokens=4)
        together = engine.generate(prompts, sampling, [10 * i for i in range(5)])
        assert engine.generate(prompts[4:], sampling, [40]) == together[4:]
    finally:
        engine.shutdown()


def test_shutdown_keeps_other_engines(dense: Tiny) -> None:
    expected = dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS)
    other = _build(dense.folder, load_format="auto")
    other.generate(PROMPTS, Sampling(1, 1), SEEDS)
    other.shutdown()
    _assert_process_group_works()
    assert dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS) == expected


def _assert_process_group_works() -> None:
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones.item() == dist.get_world_size()


@pytest.mark.parametrize("kind", list(TOLERANCE))
def test_log_probs_match_transformers_after_every_update(
    kind: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    item = tiny(kind)
    previous = None
    for version in (1, 2, 3):
        weights = item.weights(version)
        item.engine.update_weights(Weights(weights), version)
        model = item.reference(weights, tmp_path / str(version))
        for temperature in (1.0, 0.7):
            groups = item.engine.generate(PROMPTS, Sampling(2, 16, temperature), SEEDS)
            assert _log_prob_error(model, PROMPTS, groups, temperature) < TOLERANCE[kind]
            if previous is not None:
                assert _log_prob_error(previous, PROMPTS, groups, temperature) > 0.5
        previous = model


@pytest.mark.parametrize("trainer_name", ["hf_train", pytest.param("megatron_train", marks=pytest.mark.megatron)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_log_probs_match_the_trainers_while_it_trains(
    kind: str, trainer_name: str, tiny: Callable[[str], Tiny], process_group: None
) -> None:
    item = tiny(kind)
    trainer = _trainer(trainer_name, item.folder)
    versions = []
    for version in (1, 2):
        item.engine.update_weights(trainer.weights(), version)
        groups = item.engine.generate(PROMPTS, Sampling(2, 12, temperature=0.7), SEEDS)
        responses = [c.token_ids for group in groups for c in group]
        scored = trainer.score(Sequences.collate([p for p in PROMPTS for _ in range(2)], responses, pad=0))
        sampled = torch.tensor([c.log_probs for group in groups for c in group])
        assert (scored.log_probs - sampled).abs().max() < TOLERANCE[kind]
        versions.append(scored.log_probs)
        trainer.update([train_batch(version)], policy_loss, entropy=True)
    assert (versions[0] - versions[1]).abs().max() > 0.05


def _trainer(name: str, folder: Path) -> TrainStrategy:
    if name == "hf_train":
        return HfTrain(model_setup(folder), optimizer_setup(), HfConfig())
    reason = "megatron-core is not installed"
    megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine.train", reason=reason)
    return megatron.MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig())


def test_log_probs_are_of_the_truncated_distribution(dense: Tiny) -> None:
    (group,) = dense.engine.generate([PROMPTS[0]], Sampling(8, 16, top_k=1), [0])
    assert {c.log_probs for c in group} == {(0.0,) * 16}
    (nucleus,) = dense.engine.generate([PROMPTS[0]], Sampling(8, 16, top_p=0.5), [0])
    (whole,) = dense.engine.generate([PROMPTS[0]], Sampling(8, 16), [0])
    assert np.mean([c.log_probs for c in nucleus]) > np.mean([c.log_probs for c in whole]) + 0.3


def test_greedy_samples_agree_and_have_log_probs_of_temperature_one(dense: Tiny, tmp_path: Path) -> None:
    groups = dense.engine.generate(PROMPTS, Sampling(2, 12, temperature=0.0), SEEDS)
    assert all(first == second for first, second in groups)
    model = dense.reference(dense.weights(1), tmp_path)
    assert _log_prob_error(model, PROMPTS, groups) < 1e-4
    best = model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax().item()
    assert groups[0][0].token_ids[0] == best


def test_prefix_cache_is_reused_within_a_version_and_dropped_by_an_update(dense: Tiny, tmp_path: Path) -> None:
    shared = [3 + (i * 11) % 50 for i in range(200)]
    prompts = [[*shared, 5 + i] for i in range(4)]
    dense.engine.generate(prompts, Sampling(1, 4), SEEDS[:4])
    raw = dense.engine._open_engine()[0].generate([{"prompt_token_ids": prompts[0]}], use_tqdm=False)
    assert (raw[0].num_cached_tokens or 0) >= 128
    weights = dense.weights(2)
    dense.engine.update_weights(Weights(weights), 2)
    groups = dense.engine.generate(prompts, Sampling(2, 8), SEEDS[:4])
    assert _log_prob_error(dense.reference(weights, tmp_path), prompts, groups) < 1e-4


def test_engine_keeps_no_reference_to_transferred_tensors(dense: Tiny) -> None:
    weights = dense.weights(1)
    dense.engine.update_weights(Weights(weights), 2)
    expected = dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS)
    for tensor in weights.values():
        tensor.add_(1.0)
    assert dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS) == expected


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_samples_depend_on_their_seed_and_not_on_the_batch(kind: str, tiny: Callable[[str], Tiny]) -> None:
    item = tiny(kind)
    item.engine.update_weights(Weights(item.weights(1)), 1)
    together = item.engine.generate(PROMPTS, Sampling(3, 12), SEEDS)
    assert item.engine.generate(PROMPTS, Sampling(3, 12), SEEDS) == together
    backwards = item.engine.generate(PROMPTS[::-1], Sampling(3, 12), SEEDS[::-1])
    assert backwards[::-1] == together
    for sample in range(3):
        ((alone,),) = item.engine.generate([PROMPTS[4]], Sampling(1, 12), [SEEDS[4] + sample])
        assert alone == together[4][sample]
    assert len({c.token_ids for c in together[4]}) == 3


def test_stop_token_ends_and_stays_in_the_response(dense: Tiny) -> None:
    free = dense.engine.generate(PROMPTS, Sampling(4, 24), SEEDS)
    stop = free[0][0].token_ids[5]
    stopped = dense.engine.generate(PROMPTS, Sampling(4, 24, stop_token_ids=(stop,)), SEEDS)
    reasons = set()
    for without, with_stop in zip(chain(*free), chain(*stopped), strict=True):
        ends = without.token_ids.index(stop) + 1 if stop in without.token_ids else 24
        assert with_stop.token_ids == without.token_ids[:ends]
        assert len(with_stop.log_probs) == ends
        assert with_stop.finish_reason == ("stop" if stop in without.token_ids else "length")
        reasons.add(with_stop.finish_reason)
    assert reasons == {"stop", "length"}


def test_end_of_sequence_of_the_config_is_not_a_stop_token_by_itself(dense: Tiny) -> None:
    groups = dense.engine.generate(PROMPTS, Sampling(16, 32, temperature=2.0), SEEDS)
    responses = [c.token_ids for group in groups for c in group]
    assert any(EOS in tokens[:-1] for tokens in responses)
    assert {len(tokens) for tokens in responses} == {32}


def test_max_model_len_ends_a_response(dense: Tiny) -> None:
    prompt = [5] * (MAX_MODEL_LEN - 3)
    ((completion,),) = dense.engine.generate([prompt], Sampling(1, 50), [0])
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 has 0 tokens"),
        ([[5] * MAX_MODEL_LEN], f"prompt 0 has {MAX_MODEL_LEN} tokens"),
        ([[1, VOCAB]], f"vocabulary ends at {VOCAB - 1}"),
    ],
)
def test_unusable_prompts_are_refused(dense: Tiny, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dense.engine.generate(prompts, Sampling(1, 4), SEEDS[: len(prompts)])


@pytest.mark.parametrize(("seeds", "message"), [([1], "2 prompts but 1 seeds"), ([1, -1], "seed -1 is negative")])
def test_unusable_seeds_are_refused(dense: Tiny, seeds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense.engine.generate(PROMPTS[:2], Sampling(1, 4), seeds)


def test_each_sample_is_handed_out_once_while_others_go_on(dense: Tiny) -> None:
    handed: list[tuple[int, int, Completion]] = []
    counts: list[int] = []
    groups = dense.engine.generate(
        PROMPTS, Sampling(8, 8), SEEDS, lambda *_: counts.append(len(handed)), lambda *sample: handed.append(sample)
    )
    assert sorted((p, j) for p, j, _ in handed) == [(p, j) for p in range(len(PROMPTS)) for j in range(8)]
    assert all(groups[p][j] == completion for p, j, completion in handed)
    assert counts == sorted(counts) and counts[0] < counts[-1] == len(handed)


def test_progress_counts_samples_and_may_interrupt(dense: Tiny) -> None:
    calls: list[tuple[int, int]] = []
    expected = dense.engine.generate(PROMPTS, Sampling(8, 8), SEEDS, lambda done, total: calls.append((done, total)))
    total = 8 * len(PROMPTS)
    assert calls == sorted(calls)
    assert {t for _, t in calls} == {total}
    assert calls[0][0] < total == calls[-1][0]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dense.engine.generate(PROMPTS, Sampling(8, 8), SEEDS, interrupt)
    dense.engine.update_weights(Weights(dense.weights(1)), 1)
    assert dense.engine.generate(PROMPTS, Sampling(8, 8), SEEDS) == expected


def _without(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.down_proj.weight"]


def _renamed(weights: dict[str, Tensor]) -> None:
    weights["model.layers.9.mlp.down_proj.weight"] = weights["model.norm.weight"]


def _reshaped(weights: dict[str, Tensor]) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]


def _integer(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, r"1 missing: model\.layers\.1\.mlp\.down_proj\.weight"),
        (_renamed, r"1 unexpected: model\.layers\.9\.mlp\.down_proj\.weight"),
        (_reshaped, rf"model\.embed_tokens\.weight \[{VOCAB - 1}, 64\], not \[{VOCAB}, 64\]"),
        (_integer, r"not floating point: model\.norm\.weight torch\.int8"),
    ],
)
def test_wrong_weights_are_refused_until_right_ones_come(
    dense: Tiny, spoil: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    spoiled = dense.weights(2)
    spoil(spoiled)
    with pytest.raises(WeightTransferError, match=message):
        dense.engine.update_weights(Weights(spoiled), 2)
    with pytest.raises(WeightTransferError, match="version 2 failed; call update_weights first"):
        dense.engine.generate(PROMPTS, Sampling(1, 1), SEEDS)
    weights = dense.weights(3)
    dense.engine.update_weights(Weights(weights), 3)
    groups = dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS)
    assert _log_prob_error(dense.reference(weights, tmp_path), PROMPTS, groups) < 1e-4


def test_engine_is_given_up_after_an_update_that_broke_off(tmp_path: Path, process_group: None) -> None:
    _save_model("qwen3_tied", tmp_path)
    item = Tiny(tmp_path, _build(tmp_path, load_format="auto"))
    unreadable = {name: torch.empty_like(tensor, device="meta") for name, tensor in item.weights(1).items()}
    with pytest.raises(WeightTransferError, match=r"version 1: .*meta"):
        item.engine.update_weights(Weights(unreadable), 1)
    with pytest.raises(WeightTransferError, match="build a new engine"):
        item.engine.update_weights(Weights(item.weights(2)), 2)
    with pytest.raises(WeightTransferError, match="version 2 failed"):
        item.engine.generate(PROMPTS, Sampling(1, 1), SEEDS)
    item.engine.shutdown()


def test_errors_of_the_weight_source_are_transfer_errors(dense: Tiny) -> None:
    class Broken:
        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield "model.norm.weight", torch.ones(64)
            raise RuntimeError("the trainer lost a rank")

    with pytest.raises(WeightTransferError, match="version 5: RuntimeError: the trainer lost a rank"):
        dense.engine.update_weights(Broken(), 5)


def test_settings_that_do_not_fit_are_config_errors(tmp_path: Path) -> None:
    _save_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2"):
        _build(tmp_path, tensor_parallel_size=2)
    setup = ModelSetup(tmp_path, torch.float32, 1, 1.0, 0)
    with pytest.raises(ConfigError, match="max_model_len"):
        VllmGenerate(setup, VllmConfig(), max_model_len=100_000)


def test_head_sizes_of_the_plan_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert cpu_head_sizes() == CPUAttentionBackend.get_supported_head_sizes()


def test_head_sizes_that_vllm_cannot_compute_are_config_errors(tmp_path: Path) -> None:
    if not current_platform.is_cpu():
        pytest.skip("a limit of vLLM's CPU attention")
    write_model(tmp_path, "qwen3_untied")
    with pytest.raises(ConfigError, match="heads of size 16"):
        _build(tmp_path)


def test_weights_that_require_gradients_are_transferred(dense: Tiny) -> None:
    expected = dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS)
    trained = {name: tensor.requires_grad_() for name, tensor in dense.weights(1).items()}
    dense.engine.update_weights(Weights(trained), 1)
    assert dense.engine.generate(PROMPTS, Sampling(1, 8), SEEDS) == expected


@pytest.mark.parametrize(
    ("dtype", "key", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, None, torch.float32),
    ],
)
def test_head_computes_in_float32_unless_the_key_is_false(
    tmp_path: Path, dtype: torch.dtype, key: bool | None, expected: torch.dtype
) -> None:
    _save_model("qwen3_tied", tmp_path)
    config = VllmConfig(fp32_lm_head=key, kv_cache_memory_mb=1)
    args: Any = _engine_args(model_setup(tmp_path, dtype), config, MAX_MODEL_LEN)
    assert EngineArgs(**args).create_model_config().head_dtype == expected
