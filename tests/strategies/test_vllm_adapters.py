"""Adapters in vLLM: every version computes what the trainer computes, and requests keep the version that they began."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from broadcast_processes import Process, ProcessError, Worker
from engine_cases import model_setup, optimizer_setup, policy_loss, train_batch
from tiny_models import write_model
from torch import Tensor

from roll_gspo.batch import Completion, Sequences
from roll_gspo.errors import ConfigError, WeightTransferError
from roll_gspo.strategies.base import (
    FinishedRequest,
    GenerationRequest,
    GenerationSetup,
    Sampling,
    WeightSource,
)
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.model import HfWeights
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.streaming import continuation_seed
from roll_gspo.strategies.vllm.args import VllmArgs
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.memory import ADAPTER_RANKS
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastSender
from roll_gspo.strategies.weight_update import ADAPTER, FULL_MODEL

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm import SamplingParams
from vllm.config.lora import MaxLoRARanks

from roll_gspo.strategies.vllm.engine.adapters import check_targets
from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

pytestmark = pytest.mark.vllm

LORA = LoraSetup(rank=4, alpha=6.0, target_modules=("all-linear",), sync="adapter")
MAX_LENGTH, BLOCK = 256, 128  # BLOCK: tokens of a block of vLLM's CPU cache, the unit of its prefix cache
PROMPTS = [[3, 5 + i, 9, 40 + i, 7] for i in range(3)] + [[3 + (i * 7) % 50 for i in range(150)]]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


class Trainer:
    """A trainer whose adapter is drawn anew for every version."""

    def __init__(self, folder: Path, lora: LoraSetup = LORA) -> None:
        self.setup = replace(model_setup(folder), temperature=1.0, lora=lora)
        self.engine = HfTrain(self.setup, optimizer_setup(), HfConfig())

    @torch.no_grad()
    def draw(self, seed: int) -> HfTrain:
        """Set the adapter of a version, which changes log-probs by about 1."""
        assert self.engine._adapter is not None
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.engine._adapter.parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return self.engine

    def error(self, version: int, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> float:
        """Return the largest difference of the completions' log-probs from the trainer's with the adapter `version`."""
        sequences = Sequences.collate(prompts, [completion.token_ids for completion in completions], pad=0)
        scores = self.draw(version).score(sequences).log_probs
        pairs = zip(scores, completions, strict=True)
        return max(float((row[: len(c.token_ids)] - torch.tensor(c.log_probs)).abs().max()) for row, c in pairs)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(write_model(tmp_path_factory.mktemp("model"), "qwen3_tied"))


def build(trainer: Trainer, versions: int) -> VllmGenerate:
    config = VllmConfig(max_num_seqs=4, kv_cache_memory_mb=32)
    generation = GenerationSetup(MAX_LENGTH, lora=trainer.setup.lora, adapter_versions=versions)
    args = VllmArgs(strategy_name="vllm", strategy_config=config)
    engine = args.build_generator(trainer.setup, generation)
    assert isinstance(engine, VllmGenerate)
    return engine


@pytest.fixture(scope="module")
def shared(trainer: Trainer) -> Iterator[VllmGenerate]:
    engine = build(trainer, 2)
    with pytest.raises(WeightTransferError, match="no adapter was transferred yet; call update_weights first"):
        engine.generate(PROMPTS, Sampling(1, 1), [0] * len(PROMPTS))
    yield engine
    engine.shutdown()


@pytest.fixture
def engine(shared: VllmGenerate) -> Iterator[VllmGenerate]:
    yield shared
    shared._open_engine().requests.clear()


Push = Callable[[], int]


@pytest.fixture
def push(trainer: Trainer, engine: VllmGenerate) -> Push:
    """Send the next version and return it."""

    def pushed() -> int:
        version = (engine._open_engine().decoder.version or 0) + 1
        engine.update_weights(trainer.draw(version).weights(), version)
        return version

    return pushed


def names(engine: VllmGenerate) -> list[str]:
    """Return the names of the adapters that the engine holds."""
    slots, open_engine = engine._open_engine().decoder._adapters, engine._open_engine()
    assert slots is not None
    (held,) = open_engine.llm.apply_model(lambda model: set(model.lora_manager.list_adapters()))  # type: ignore[operator]
    assert held == open_engine.llm.llm_engine.list_loras() == set(slots._held)
    return slots.names


def request(key: int, tokens: int, partial: Completion | None = None) -> GenerationRequest:
    return GenerationRequest(key, tuple(PROMPTS[key % 3]), Sampling(1, tokens), seed=key, partial=partial)


def drain(engine: VllmGenerate) -> dict[int, Completion]:
    """Return the completions of all outstanding requests."""
    finished: list[FinishedRequest] = []
    while engine._open_engine().requests.num_running:
        finished += engine.advance(0.0)
    return dict(finished)


def completed(completions: dict[int, Completion]) -> tuple[list[list[int]], list[Completion]]:
    return [PROMPTS[key % 3] for key in completions], list(completions.values())


def test_log_probs_are_those_of_the_trainer_in_every_version(
    trainer: Trainer, engine: VllmGenerate, push: Push
) -> None:
    seen = []
    for _ in range(3):
        version = push()
        groups = engine.generate(PROMPTS, Sampling(2, 8), [10 * i for i in range(len(PROMPTS))])
        prompts, completions = [p for p in PROMPTS for _ in range(2)], [c for group in groups for c in group]
        assert trainer.error(version, prompts, completions) < 1e-4
        assert trainer.error(version + 50, prompts, completions) > 0.1, "another adapter is told apart"
        assert {run for c in completions for run in c.version_runs} == {(version, 8)}
        assert names(engine) == [f"policy-{version}"]
        seen.append(groups)
    assert seen[0] != seen[1] != seen[2]


def test_every_optimizer_step_changes_what_is_pushed(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    version, digests = push(), []
    for step in range(3):
        source = trainer.engine.weights()
        content = {name: tensor.clone() for name, tensor in source}
        digests.append(hashlib.sha256(b"".join(t.numpy().tobytes() for t in content.values())).hexdigest())
        full = sum(tensor.numel() for _, tensor in HfWeights(trainer.engine._model))
        assert 4 * sum(tensor.numel() for tensor in content.values()) < full
        engine.update_weights(source, version + 1 + step)
        result = trainer.engine.update([train_batch(step)], policy_loss, True)
        assert result.applied
    assert len(set(digests)) == 3


def test_running_requests_keep_their_version(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    old = push()
    engine.submit([request(0, 12), request(1, 12)])
    assert engine.advance(0.0) == []
    new = push()
    assert names(engine) == [f"policy-{old}", f"policy-{new}"]
    engine.submit([request(2, 6)])
    done = drain(engine)
    assert [done[key].version_runs for key in range(3)] == [((old, 12),), ((old, 12),), ((new, 6),)]
    newest = {2: done.pop(2)}
    assert trainer.error(old, *completed(done)) < 1e-4
    assert trainer.error(new, *completed(newest)) < 1e-4
    assert names(engine) == [f"policy-{new}"]


def test_requests_without_a_token_use_the_newest_version(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    old = push()
    engine.submit([request(key, 6) for key in range(6)])  # of which 4 run
    assert engine.advance(0.0) == []
    new = push()
    done = drain(engine)
    assert [done[key].version_runs for key in range(6)] == [((old, 6),)] * 4 + [((new, 6),)] * 2
    assert trainer.error(new, *completed({key: done[key] for key in (4, 5)})) < 1e-4
    fresh = engine.generate([PROMPTS[1]], Sampling(1, 6), [4])[0][0]
    assert fresh == done[4], "a request that had waited has the random numbers of its seed"


def test_the_rest_of_a_partial_response_is_of_the_newest_version(
    trainer: Trainer, engine: VllmGenerate, push: Push
) -> None:
    old = push()
    engine.submit([request(0, 10)])
    for _ in range(4):
        engine.advance(0.0)
    ((_, partial),) = engine.abort([0])
    known = len(partial.token_ids)
    assert partial.version_runs == ((old, known),) and 0 < known < 10
    new = push()
    assert names(engine) == [f"policy-{new}"]
    engine.submit([request(0, 10, partial)])
    whole = drain(engine)[0]
    assert whole.version_runs == ((old, known), (new, 10 - known))
    rest = replace(whole, token_ids=whole.token_ids[known:], log_probs=whole.log_probs[known:])
    assert trainer.error(new, [[*PROMPTS[0], *whole.token_ids[:known]]], [rest]) < 1e-4


def test_oldest_requests_continue_with_the_newest_version_if_there_are_too_many(
    trainer: Trainer, engine: VllmGenerate, push: Push
) -> None:
    versions = []
    for key in range(2):
        versions.append(push())
        engine.submit([request(key, 20)])
        engine.advance(0.0)
    versions.append(push())  # a third version, where two may have requests
    assert names(engine) == [f"policy-{version}" for version in versions[1:]]
    done = drain(engine)
    (first, count), (last, rest) = done[0].version_runs
    assert (first, last) == (versions[0], versions[2]) and count + rest == 20
    assert done[1].version_runs == ((versions[1], 20),)
    tail = replace(done[0], token_ids=done[0].token_ids[count:], log_probs=done[0].log_probs[count:])
    prompt = [*PROMPTS[0], *done[0].token_ids[:count]]
    assert trainer.error(versions[2], [prompt], [tail]) < 1e-4
    sampling = Sampling(1, rest)
    assert engine.generate([prompt], sampling, [continuation_seed(0, count)])[0][0].token_ids == tail.token_ids


def test_prefix_cache_of_one_version_is_not_used_by_another(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    def cached() -> int | None:
        """Return the number of prompt tokens whose keys and values were in the cache."""
        open_engine = engine._open_engine()
        assert open_engine.decoder._adapters is not None
        (output,) = open_engine.llm.generate(
            {"prompt_token_ids": PROMPTS[3]},
            SamplingParams(max_tokens=1, detokenize=False),
            use_tqdm=False,
            lora_request=open_engine.decoder._adapters.newest,
        )
        return output.num_cached_tokens

    for _ in range(2):
        version = push()
        assert [cached(), cached()] == [0, BLOCK]
        assert trainer.error(version, PROMPTS[3:], engine.generate(PROMPTS[3:], Sampling(1, 8), [0])[0]) < 1e-4


def test_same_version_sent_again_changes_nothing(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    version = push()
    engine.submit([request(0, 8)])
    engine.advance(0.0)
    engine.update_weights(trainer.draw(version).weights(), version)
    assert names(engine) == [f"policy-{version}"]
    assert drain(engine)[0].version_runs == ((version, 8),)
    engine.update_weights(trainer.draw(version + 1).weights(), version)
    held = names(engine)
    assert len(held) == 1 and held[0].startswith(f"policy-{version}-")


def test_adapters_outlive_a_sleep(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    """The worker frees nothing on a CPU. Scheduler and requests are those of a GPU."""
    memory = engine._open_engine().memory
    if memory._enabled:
        pytest.skip("a machine with a GPU")
    version = push()
    engine.submit([request(0, 8)])
    engine.advance(0.0)
    memory._enabled = True
    try:
        engine.reside(Residency.OFFLOADED)
        engine.reside(Residency.FULL)
    finally:
        memory._enabled = False
    done = drain(engine)
    assert done[0].version_runs == ((version, 8),)
    assert trainer.error(version, *completed(done)) < 1e-4


class Source(WeightSource):
    """Tensors of any kind."""

    def __init__(self, tensors: dict[str, Tensor], kind: str = ADAPTER) -> None:
        self.tensors = tensors
        self.kind = kind

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


def without_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(Q_PROJ)}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "pair": (
        lambda good: {name: tensor for name, tensor in good.items() if name != f"{Q_PROJ}.lora_B.weight"},
        r"1 missing: .*\.0\.self_attn\.q_proj\.lora_B\.weight",
    ),
    "rank": (
        lambda good: good | {f"{Q_PROJ}.lora_A.weight": good[f"{Q_PROJ}.lora_A.weight"][:2]},
        r"q_proj\.lora_A\.weight \[2, 64\], not \[4, 64\]",
    ),
    "layout": (
        lambda good: good | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
        r"1 unexpected: model\.layers\.0",
    ),
    "module": (
        lambda good: good | {f"base_model.model.lm_head.lora_{m}.weight": torch.zeros(s) for m, s in HEAD.items()},
        r"1 modules that vLLM cannot adapt: lm_head",
    ),
    "set": (without_layer, r"2 missing: .*q_proj"),
    "empty": (lambda good: {}, "no tensor of an adapter"),
}
HEAD = {"A": (4, 64), "B": (64, 4)}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_adapter_is_refused_and_the_old_one_kept(
    trainer: Trainer, engine: VllmGenerate, push: Push, case: str
) -> None:
    version = push()
    engine.submit([request(0, 8)])
    engine.advance(0.0)
    change, message = WRONG[case]
    good = {name: tensor.clone() for name, tensor in trainer.draw(version + 1).weights()}
    with pytest.raises(WeightTransferError, match=message + ".*the old adapter was kept"):
        engine.update_weights(Source(change(good)), version + 1)
    with pytest.raises(WeightTransferError, match=f"the transfer of version {version + 1} failed"):
        engine.advance(0.0)
    assert names(engine) == [f"policy-{version}"]
    engine.update_weights(Source(good), version + 1)
    done = drain(engine)
    assert done[0].version_runs == ((version, 8),)
    assert trainer.error(version, *completed(done)) < 1e-4


def test_engine_of_adapters_refuses_a_model(trainer: Trainer, engine: VllmGenerate, push: Push) -> None:
    version = push()
    with pytest.raises(WeightTransferError, match=r"sends all weights of the model .* was built for LoRA adapters"):
        engine.update_weights(Source(dict(HfWeights(trainer.engine._model)), FULL_MODEL), version + 1)
    assert names(engine) == [f"policy-{version}"]
    push()


def test_target_that_vllm_cannot_adapt_is_named(engine: VllmGenerate) -> None:
    llm = engine._open_engine().llm
    check_targets(llm, replace(LORA, target_modules=("q_proj", "mlp.up_proj")))
    message = (
        r"target_modules: vLLM cannot adapt lm_head of this model, only down_proj, .*; remove .* set .*sync: merged"
    )
    with pytest.raises(ConfigError, match=message):
        check_targets(llm, replace(LORA, target_modules=("q_proj", "lm_head")))


def test_ranks_are_those_that_vllm_knows() -> None:
    assert get_args(MaxLoRARanks) == ADAPTER_RANKS


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


def connect(process: Process, trainer: Trainer, workers: int = 1) -> WeightBroadcastSender:
    """Build an engine in the process and connect it."""
    process.call(Worker.build_engine, trainer.setup.checkpoint, workers, trainer.setup.lora)
    sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", 0, 1 + workers, timeout_s=30.0), 8192)
    process.call(Worker.connect_engine, sender.address)
    return sender


def transfer(process: Process, sender: WeightBroadcastSender, source: WeightSource, kind: str, version: int) -> None:
    process.start(Worker.receive_engine, version)
    sender.send(source, version, checksum=True, kind=kind)
    process.result()


def generate(process: Process) -> list[list[Completion]]:
    return process.call(Worker.generate, PROMPTS, 1, 8)  # type: ignore[return-value]


def check_process(process: Process, trainer: Trainer, workers: int) -> None:
    sender = connect(process, trainer, workers)
    transfer(process, sender, trainer.draw(1).weights(), ADAPTER, 1)
    first = generate(process)
    assert trainer.error(1, PROMPTS, [group[0] for group in first]) < 1e-4
    with pytest.raises(WeightTransferError, match=r"vllm worker 0, .* sends all weights of the model"):
        transfer(process, sender, HfWeights(trainer.engine._model), FULL_MODEL, 2)
    with pytest.raises(ProcessError, match="was built for LoRA adapters"):
        process.result()
    wrong = Source(without_layer(dict(trainer.draw(2).weights())))
    with pytest.raises(WeightTransferError, match=r"2 missing: .*; the old adapter was kept"):
        transfer(process, sender, wrong, ADAPTER, 2)
    with pytest.raises(ProcessError, match="the old adapter was kept"):
        process.result()
    transfer(process, sender, trainer.draw(2).weights(), ADAPTER, 2)
    second = generate(process)
    assert trainer.error(2, PROMPTS, [group[0] for group in second]) < 1e-4
    assert first != second
    sender.close()


def test_engine_in_another_process_receives_adapters(process: Process, trainer: Trainer) -> None:
    check_process(process, trainer, 1)


@pytest.mark.long
def test_engine_of_two_workers_receives_adapters(process: Process, trainer: Trainer) -> None:
    check_process(process, trainer, 2)


@pytest.mark.long
def test_killed_engine_is_replaced_and_gets_the_adapter_again(trainer: Trainer) -> None:
    found = []
    for _ in range(2):
        process = Process()
        sender = connect(process, trainer)
        transfer(process, sender, trainer.draw(1).weights(), ADAPTER, 1)
        found.append(generate(process))
        process.process.kill()
        process.process.join()
        sender.close()
    assert found[0] == found[1]
    assert trainer.error(1, PROMPTS, [group[0] for group in found[1]]) < 1e-4
