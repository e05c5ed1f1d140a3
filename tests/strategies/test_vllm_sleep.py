"""Sleep mode of vLLM: the order of its calls on a recorded engine, and its scheduler on a real one without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vllm is not installed")

from tiny_models import write_model
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform, PlatformEnum

from roll_gspo.errors import ConfigError, ResidencyError, WeightTransferError
from roll_gspo.strategies.base import GenerationRequest, ModelSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import HfWeights, load_model
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.engine.generate import VllmGenerate
from roll_gspo.strategies.vllm.engine.sleep import SleepMode, sleep_args

pytestmark = pytest.mark.vllm
OFFLOADED, WEIGHTS, FULL = Residency


class RecordedLLM:
    """An `LLM` that records the calls that move memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails_at = ""
        self.awake = True

    def _record(self, call: str) -> None:
        if call == self.fails_at:
            self.fails_at = ""
            raise AssertionError("Memory usage increased after sleeping.")
        self.calls.append(call)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self._record(f"sleep {level} {mode}")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self._record(f"wake {tags}")
        return self.awake

    def reset_prefix_cache(self) -> bool:
        self._record("reset")
        return True


SLEEP, WAKE_WEIGHTS, WAKE_CACHE = "sleep 2 keep", "wake ['weights']", "wake ['kv_cache']"


@pytest.mark.parametrize(
    ("moves", "calls"),
    [
        ((FULL,), []),
        ((OFFLOADED,), [SLEEP]),
        ((OFFLOADED, OFFLOADED), [SLEEP]),
        ((OFFLOADED, WEIGHTS, FULL), [SLEEP, WAKE_WEIGHTS, WAKE_CACHE, "reset"]),
        ((OFFLOADED, FULL), [SLEEP, WAKE_WEIGHTS, WAKE_CACHE, "reset"]),
        ((WEIGHTS,), [SLEEP, WAKE_WEIGHTS]),
        ((OFFLOADED, WEIGHTS, OFFLOADED), [SLEEP, WAKE_WEIGHTS, SLEEP]),
    ],
)
def test_order_of_sleep_and_wake(moves: tuple[Residency, ...], calls: list[str]) -> None:
    llm = RecordedLLM()
    mode = SleepMode(llm, enabled=True)
    for move in moves:
        mode.reside(move)
        assert mode.residency == move
    assert llm.calls == calls


def test_weights_of_the_checkpoint_are_kept_in_host_memory() -> None:
    llm = RecordedLLM()
    mode = SleepMode(llm, enabled=True, keeps_weights=True)
    mode.reside(OFFLOADED)
    mode.reside(FULL)
    assert llm.calls == ["sleep 1 keep", WAKE_WEIGHTS, WAKE_CACHE, "reset"]


@pytest.mark.parametrize(
    ("fails_at", "reached", "then"),
    [
        (SLEEP, FULL, [SLEEP, WAKE_WEIGHTS, WAKE_CACHE, "reset"]),
        (WAKE_WEIGHTS, OFFLOADED, [SLEEP, WAKE_WEIGHTS, WAKE_CACHE, "reset"]),
        (WAKE_CACHE, WEIGHTS, [SLEEP, WAKE_WEIGHTS, WAKE_CACHE, "reset"]),
    ],
)
def test_a_failed_call_leaves_the_state_that_was_reached(fails_at: str, reached: Residency, then: list[str]) -> None:
    llm = RecordedLLM()
    mode = SleepMode(llm, enabled=True)
    llm.fails_at = fails_at

    def cycle() -> None:
        mode.reside(min(mode.residency, OFFLOADED))
        mode.reside(FULL)

    with pytest.raises(
        ResidencyError, match=r"AssertionError: Memory usage increased .*; lower gpu_memory_utilization"
    ):
        cycle()
    assert mode.residency == reached
    if reached == FULL:
        mode.reside(OFFLOADED)
    mode.reside(FULL)
    assert llm.calls == then


def test_an_engine_that_does_not_wake_is_an_error() -> None:
    llm = RecordedLLM()
    mode = SleepMode(llm, enabled=True)
    mode.reside(WEIGHTS)
    llm.awake = False
    with pytest.raises(ResidencyError, match="parts of the engine are asleep"):
        mode.reside(FULL)
    assert mode.residency == WEIGHTS


def test_work_while_asleep_is_an_error() -> None:
    mode = SleepMode(RecordedLLM(), enabled=True)
    mode.reside(OFFLOADED)
    with pytest.raises(ResidencyError, match=r"^vllm: cannot generate while its state is offloaded"):
        mode.require(FULL, "generate")
    mode.reside(WEIGHTS)
    mode.require(WEIGHTS, "receive weights")


def test_an_engine_without_sleep_mode_says_so() -> None:
    with pytest.raises(ResidencyError, match=r"built without sleep mode.*offload_states"):
        SleepMode(RecordedLLM(), enabled=False).reside(OFFLOADED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sleeping"), "qwen3_tied")


def _setup(folder: Path) -> ModelSetup:
    return ModelSetup(folder, torch.float32, micro_batch_size=4, temperature=1.0, seed=0)


def test_vllm_takes_the_argument_on_gpus_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not current_platform.is_cpu():
        pytest.skip("a machine with a GPU")
    with pytest.raises(ConfigError, match="Sleep mode is not supported on current platform"):
        VllmGenerate(_setup(folder), VllmConfig(), 64, shares_devices=True)
    arguments = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32"} | sleep_args(True)
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    assert EngineArgs(**arguments).create_model_config().enable_sleep_mode  # type: ignore[arg-type]
    cuda = object.__new__(Platform)
    cuda._enum = PlatformEnum.CUDA
    monkeypatch.undo()
    assert cuda.is_sleep_mode_available()


def test_a_real_engine_sleeps_and_wakes_with_new_weights(folder: Path) -> None:
    """Its worker frees nothing on a CPU. Scheduler, requests and weight transfer are those of a GPU."""
    if not current_platform.is_cpu():
        pytest.skip("a machine with a GPU")
    engine = VllmGenerate(_setup(folder), VllmConfig(max_num_seqs=8, kv_cache_memory_mb=16), 64)
    assert engine._engine is not None
    engine._engine.memory._enabled = True
    model = load_model(folder, torch.float32, "sdpa")

    def weights() -> list[tuple[str, Tensor]]:
        return list(HfWeights(model))

    sampling, prompts, seeds = Sampling(2, 12), [[3, 4, 5], [6, 7]], [1, 2]
    engine.update_weights(weights(), 0)
    first = engine.generate(prompts, sampling, seeds)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.reside(OFFLOADED)
    assert engine.residency == OFFLOADED
    for work, call in {
        "generate": lambda: engine.generate(prompts, sampling, seeds),
        "submit": lambda: engine.submit([GenerationRequest(0, (3,), sampling, 1)]),
        "receive weights": lambda: engine.update_weights(weights(), 1),
    }.items():
        with pytest.raises(ResidencyError, match=f"^vllm: cannot {work} while its state is offloaded"):
            call()
    engine.reside(FULL)
    with pytest.raises(WeightTransferError, match="the weights were freed when the engine left its device"):
        engine.generate(prompts, sampling, seeds)
    engine.reside(OFFLOADED)
    engine.reside(WEIGHTS)
    engine.update_weights(weights(), 1)
    engine.reside(FULL)
    second = engine.generate(prompts, sampling, seeds)
    assert [c.log_probs for group in second for c in group] != [c.log_probs for group in first for c in group]
    reference = HfInfer(_setup(folder), HfConfig())
    reference.update_weights(weights(), 1)
    expected = reference.generate(prompts, sampling, seeds)
    for group, others in zip(second, expected, strict=True):
        for completion, other in zip(group, others, strict=True):
            if completion.token_ids == other.token_ids:
                assert torch.allclose(torch.tensor(completion.log_probs), torch.tensor(other.log_probs), atol=1e-4)
    engine.shutdown()


def test_requests_outlive_a_sleep(folder: Path) -> None:
    if not current_platform.is_cpu():
        pytest.skip("a machine with a GPU")
    engine = VllmGenerate(_setup(folder), VllmConfig(max_num_seqs=8, kv_cache_memory_mb=16), 64)
    assert engine._engine is not None
    engine._engine.memory._enabled = True
    weights = list(HfWeights(load_model(folder, torch.float32, "sdpa")))
    engine.update_weights(weights, 0)
    requests = [GenerationRequest(key, (3 + key, 9), Sampling(1, 20), key) for key in range(3)]
    engine.submit(requests)
    whole = {key: completion.token_ids for key, completion in engine.advance(60)}
    engine.submit(requests)
    assert engine.advance(0.0) == []
    engine.reside(OFFLOADED)
    engine.reside(WEIGHTS)
    engine.update_weights(weights, 0)
    engine.reside(FULL)
    assert {key: completion.token_ids for key, completion in engine.advance(60)} == whole
    engine.shutdown()
