"""Both generation engines as streams of requests, against `generate` and against transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from roll_gspo.batch import Completion
from roll_gspo.errors import ConfigError, DataError, WeightTransferError
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, ModelSetup, Sampling, StreamingStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import HfWeights
from roll_gspo.strategies.streaming import continuation_seed
from roll_gspo.strategies.vllm.config import VllmConfig

CAPACITY, MAX_MODEL_LEN = 4, 96
PROMPTS = [tuple(3 + (i * 7 + n) % 50 for n in range(1 + (i * 5) % 11)) for i in range(10)]
SAMPLING = Sampling(1, 40, stop_token_ids=(1, 17, 20))
ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("dense"), "qwen3_tied")


def _write_model(folder: Path, family: str) -> Path:
    """Write a model with attention heads of 32, the smallest that vLLM computes on a CPU."""
    model_class, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> Iterator[Callable[[str], StreamingStrategy]]:
    """Return the engine of a kind, built once."""
    engines: dict[str, StreamingStrategy] = {}

    def get(kind: str) -> StreamingStrategy:
        if kind not in engines:
            engines[kind] = _build(kind, folder)
        return engines[kind]

    yield get
    for engine in engines.values():
        engine.shutdown()


def _build(kind: str, folder: Path, **options: bool) -> StreamingStrategy:
    setup = ModelSetup(folder, torch.float32, micro_batch_size=1, temperature=1.0, seed=0)
    if kind == "hf":
        return HfInfer(setup, HfConfig(generate_batch_size=CAPACITY))
    pytest.importorskip("vllm", reason="vllm is not installed")
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return VllmGenerate(setup, VllmConfig(max_num_seqs=CAPACITY, kv_cache_memory_mb=32), MAX_MODEL_LEN, **options)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[int, PreTrainedModel]:
    """Return a model per weights version; those of different versions choose other tokens."""
    found = {}
    for version in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(version)
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise)
        found[version] = model
    return found


@pytest.fixture(params=ENGINES)
def engine(
    request: pytest.FixtureRequest, built: Callable[[str], StreamingStrategy], models: dict[int, PreTrainedModel]
) -> StreamingStrategy:
    """Return an engine with the weights of version 1 and no requests."""
    found = built(request.param)
    found.abort(range(100))
    found.update_weights(_weights(models[1]), 1)
    return found


def _weights(model: PreTrainedModel) -> _Source:
    return _Source(HfWeights(model))


class _Source:
    def __init__(self, weights: HfWeights) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.detach()) for name, tensor in self._weights)


def _request(key: int, **changes: object) -> GenerationRequest:
    return replace(GenerationRequest(key, PROMPTS[key], SAMPLING, seed=50 * key), **changes)  # type: ignore[arg-type]


def _all(engine: StreamingStrategy) -> dict[int, Completion]:
    """Advance until no request is outstanding."""
    found = {}
    while engine.partials():
        found |= dict(engine.advance(0))
    return found


@torch.no_grad()
def _scores(model: PreTrainedModel, key: int, completion: Completion) -> Tensor:
    tokens = torch.tensor([*PROMPTS[key], *completion.token_ids])
    logits = model(tokens[None]).logits[0, len(PROMPTS[key]) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[len(PROMPTS[key]) :, None])[:, 0]


def _assert_log_probs(model: PreTrainedModel, key: int, completion: Completion) -> None:
    found = torch.tensor(completion.log_probs)
    torch.testing.assert_close(found, _scores(model, key, completion), rtol=0, atol=1e-4)


def _assert_same(found: Completion, expected: Completion) -> None:
    assert replace(found, log_probs=()) == replace(expected, log_probs=())
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)


def test_streamed_requests_equal_generate(engine: StreamingStrategy, models: dict[int, PreTrainedModel]) -> None:
    expected = engine.generate(PROMPTS, SAMPLING, [50 * key for key in range(10)])
    assert engine.capacity == CAPACITY
    waiting, found = [_request(key) for key in range(10)], {}
    engine.submit(waiting[:2])
    for request in waiting[2:]:  # each joins while others decode
        found |= dict(engine.advance(0))
        engine.submit([request])
    found |= _all(engine)
    for key, (completion,) in enumerate(expected):
        _assert_same(found[key], completion)
        assert found[key].version_runs == ((1, len(completion.token_ids)),)
        _assert_log_probs(models[1], key, completion)
    assert {completion.finish_reason for completion in found.values()} == {"stop", "length"}
    assert engine.advance(0) == [] and engine.abort([0, 77]) == []


def test_requests_of_different_distributions_decode_together(engine: StreamingStrategy) -> None:
    greedy, peaked = Sampling(1, 12, temperature=0.0), Sampling(1, 9, temperature=0.5, top_k=5)
    kinds = [greedy, SAMPLING, peaked, greedy, SAMPLING, peaked]
    engine.submit([_request(key, sampling=kind) for key, kind in enumerate(kinds)])
    found = _all(engine)
    for key, kind in enumerate(kinds):
        _assert_same(found[key], engine.generate([PROMPTS[key]], kind, [50 * key])[0][0])


def test_generate_leaves_outstanding_requests_alone(engine: StreamingStrategy) -> None:
    expected = engine.generate(PROMPTS, SAMPLING, [50 * key for key in range(10)])
    engine.submit([_request(key) for key in range(3)])
    engine.advance(0)
    again = engine.generate(PROMPTS[3:], SAMPLING, [50 * key for key in range(3, 10)])
    found = _all(engine)
    for key in range(10):
        _assert_same(found[key] if key < 3 else again[key - 3][0], expected[key][0])


def test_abort_returns_the_tokens_so_far_and_the_rest_continues(engine: StreamingStrategy) -> None:
    free = Sampling(1, 40)
    expected = engine.generate(PROMPTS[:6], free, [50 * key for key in range(6)])
    engine.submit([_request(key, sampling=free) for key in range(6)])
    for _ in range(5):
        assert engine.advance(0) == []
    aborted = dict(engine.abort([1, 5, 9]))
    assert set(aborted) == {1, 5}, "5 waited for room"
    assert aborted[5] == Completion((), (), "partial")
    count = len(aborted[1].token_ids)
    assert 4 <= count <= 6 and aborted[1].finish_reason == "partial"
    assert aborted[1].version_runs == ((1, count),)
    whole = expected[1][0]
    shortened = Completion(whole.token_ids[:count], whole.log_probs[:count], "partial", None, ((1, count),))
    _assert_same(aborted[1], shortened)
    found = _all(engine)
    assert set(found) == {0, 2, 3, 4}
    for key, completion in found.items():
        _assert_same(completion, expected[key][0])


def test_partial_responses_continue(engine: StreamingStrategy, models: dict[int, PreTrainedModel]) -> None:
    free = Sampling(1, 30)
    engine.submit([_request(key, sampling=free) for key in range(4)])
    for _ in range(7):
        engine.advance(0)
    partials = dict(engine.partials())
    assert partials == dict(engine.abort(range(4))) and len(partials) == 4
    requests = [_request(key, sampling=free, partial=partials[key]) for key in range(4)]
    engine.submit(requests)
    assert dict(engine.partials()) == partials
    found = _all(engine)
    for key, completion in found.items():
        known = len(partials[key].token_ids)
        assert completion.token_ids[:known] == partials[key].token_ids
        assert (len(completion.token_ids), completion.finish_reason) == (30, "length")
        assert completion.version_runs == ((1, 30),)
        _assert_log_probs(models[1], key, completion)
        seed = continuation_seed(50 * key, known)
        rest = engine.generate(
            [PROMPTS[key] + partials[key].token_ids], replace(free, max_new_tokens=30 - known), [seed]
        )
        assert completion.token_ids[known:] == rest[0][0].token_ids
    engine.submit(requests)
    for key, completion in _all(engine).items():
        _assert_same(completion, found[key])


def test_complete_partial_responses_end_at_once(engine: StreamingStrategy) -> None:
    of_version = ((1, 2),)
    ends = {"stop": Completion((5, 17), (-1.0, -2.0), "partial", None, of_version)}
    ends["length"] = replace(ends["stop"], token_ids=(5, 6))
    for key, (reason, partial) in enumerate(ends.items()):
        engine.submit([_request(key, sampling=replace(SAMPLING, max_new_tokens=2), partial=partial)])
        assert engine.advance(0) == [FinishedRequest(key, replace(partial, finish_reason=reason))]


def test_weights_change_while_responses_are_sampled(
    engine: StreamingStrategy, models: dict[int, PreTrainedModel]
) -> None:
    free = Sampling(1, 30)
    engine.submit([_request(key, sampling=free) for key in range(6)])
    for _ in range(8):
        engine.advance(0)
    before = dict(engine.partials())
    engine.update_weights(_weights(models[2]), 2)
    assert dict(engine.partials()) == before
    found = _all(engine)
    assert set(found) == set(range(6))
    for key, completion in found.items():
        count = len(before[key].token_ids)
        expected = _scores(models[2], key, completion)
        expected[:count] = _scores(models[1], key, completion)[:count]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=1e-4)
        assert completion.token_ids[:count] == before[key].token_ids
        assert completion.version_runs == (((1, count), (2, 30 - count)) if count else ((2, 30),))
    assert [len(before[key].token_ids) > 0 for key in range(6)] == [True] * 4 + [False] * 2


def test_failed_update_keeps_the_requests(engine: StreamingStrategy, models: dict[int, PreTrainedModel]) -> None:
    engine.submit([_request(key) for key in range(3)])
    engine.advance(0)
    before = engine.partials()
    incomplete = [pair for pair in _weights(models[2]) if pair[0] != "model.norm.weight"]
    with pytest.raises(WeightTransferError):
        engine.update_weights(incomplete, 2)
    for call in (lambda: engine.advance(0), lambda: engine.submit([_request(4)])):
        with pytest.raises(WeightTransferError):
            call()
    assert engine.partials() == before
    engine.update_weights(_weights(models[2]), 3)
    assert {run[-1][0] for run in (c.version_runs for c in _all(engine).values())} == {3}


def test_interrupt_leaves_no_requests(
    engine: StreamingStrategy, monkeypatch: pytest.MonkeyPatch, models: dict[int, PreTrainedModel]
) -> None:
    expected = engine.generate(PROMPTS, SAMPLING, [0] * 10)
    engine.submit([_request(key) for key in range(6)])
    engine.advance(0)
    with monkeypatch.context() as patched:

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(torch.nn.Module, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.advance(10)
    assert engine.partials() == [] and engine.advance(0) == []
    engine.update_weights(_weights(models[1]), 1)
    assert engine.generate(PROMPTS, SAMPLING, [0] * 10) == expected


def test_unusable_requests_are_refused(engine: StreamingStrategy) -> None:
    engine.submit([_request(3)])
    wrong = Completion((5, 6), (-1.0,), "partial")
    for request, error, message in (
        (_request(0, prompt=()), DataError, "prompt of request 0 has 0 tokens"),
        (_request(0, prompt=(5, 1000)), DataError, "ids from 5 to 1000"),
        (_request(0, seed=-1), ValueError, "seed -1 is negative"),
        (_request(3), ValueError, "request 3 is outstanding already"),
        (replace(_request(0), key=-1), ValueError, "key -1 is negative"),
        (_request(0, partial=wrong), ValueError, "2 tokens, but 1 log-probs"),
        (_request(0, partial=replace(wrong, log_probs=(-1.0, -1.0), version_runs=((1, 3),))), ValueError, "runs"),
    ):
        with pytest.raises(error, match=message):
            engine.submit([_request(7), request])
    assert [key for key, _ in engine.partials()] == [3]


@pytest.mark.parametrize("kind", ENGINES)
def test_shutdown_drops_requests(kind: str, folder: Path, models: dict[int, PreTrainedModel]) -> None:
    engine = _build(kind, folder)
    engine.update_weights(_weights(models[1]), 1)
    engine.submit([_request(key) for key in range(6)])
    engine.advance(0)
    engine.shutdown()
    with pytest.raises(RuntimeError, match="shut"):
        engine.advance(0)


@pytest.mark.vllm
def test_recorded_experts_exclude_partial_responses_and_changing_weights(tmp_path: Path) -> None:
    engine = _build("vllm", _write_model(tmp_path, "qwen3_moe"), record_routed_experts=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    try:
        engine.update_weights(_weights(model), 1)
        engine.submit([_request(key) for key in range(6)])
        engine.advance(0)
        with pytest.raises(ConfigError, match="weights change while responses are sampled"):
            engine.update_weights(_weights(model), 2)
        (aborted,) = engine.abort([1])
        assert aborted.completion.token_ids and aborted.completion.routed_experts is None
        with pytest.raises(ConfigError, match="partial_rollouts: restart"):
            engine.submit([_request(1, partial=aborted.completion)])
        found = _all(engine)
        for key, completion in found.items():
            experts = completion.routed_experts
            assert experts is not None and len(experts) == len(PROMPTS[key]) + len(completion.token_ids) - 1
        assert set(found) == {0, 2, 3, 4, 5}
        engine.update_weights(_weights(model), 2)
    finally:
        engine.shutdown()


def test_seeds_of_continuations() -> None:
    assert continuation_seed(7, 0) == 7
    seeds = [continuation_seed(seed, known) for seed in range(30) for known in range(1, 30)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert continuation_seed(7, 3) == 616456930342725979
