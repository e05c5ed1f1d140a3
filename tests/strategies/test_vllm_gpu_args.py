"""Arguments of vLLM on GPUs, without one: this process says that its platform is CUDA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import Checkpoints, model_setup

pytest.importorskip("vllm")

import ray.util
from vllm.config import parallel
from vllm.config.parallel import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor import ray_utils

from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.engine import generate

pytestmark = pytest.mark.vllm


class Gpus:
    """The part of vLLM's platform that the arguments depend on."""

    @staticmethod
    def is_cpu() -> bool:
        return False


def engine_args(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: object) -> dict[str, object]:
    monkeypatch.setattr(generate, "current_platform", Gpus)
    return generate._engine_args(model_setup(folder, torch.bfloat16), VllmConfig(**config), 128)


def test_arguments_on_gpus_leave_sizes_to_vllm(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    args = engine_args(checkpoint("qwen3_tied"), monkeypatch)
    assert args["dtype"] == "bfloat16"
    unset = {"max_num_seqs": None, "max_num_batched_tokens": None, "enforce_eager": False}
    assert {name: args[name] for name in unset} == unset
    assert not {"kv_cache_memory_bytes", "enable_chunked_prefill"} & args.keys()
    assert args["distributed_executor_backend"] == "uni"
    assert args.keys() <= set(EngineArgs.__dataclass_fields__) | {"use_tqdm_on_load"}
    assert engine_args(checkpoint("qwen3_tied"), monkeypatch, max_num_seqs=7)["max_num_seqs"] == 7


def test_number_of_sequences_is_fixed_on_a_cpu(checkpoint: Checkpoints) -> None:
    if not generate.current_platform.is_cpu():
        pytest.skip("vLLM is built for GPUs")
    args = generate._engine_args(model_setup(checkpoint("qwen3_tied")), VllmConfig(), 128)
    assert args["max_num_seqs"] == 256


@pytest.fixture
def placement_group_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on CUDA inside a placement group with one bundle of two GPUs, as this project reserves them."""
    cuda = {
        "is_cuda": lambda: True,
        "is_tpu": lambda: False,
        "is_cpu": lambda: False,
        "is_rocm": lambda: False,
        "is_xpu": lambda: False,
        "is_cuda_alike": lambda: True,
        "device_count": lambda: 2,
        "use_custom_allreduce": lambda: True,
        "device_type": "cuda",
    }
    monkeypatch.setattr(parallel, "current_platform", SimpleNamespace(**cuda))
    group = SimpleNamespace(bundle_specs=[{"GPU": 2.0}])
    monkeypatch.setattr(ray_utils, "ray_is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: group)


@pytest.mark.usefixtures("placement_group_of_two_gpus")
def test_two_gpus_are_driven_by_vllm_itself(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ParallelConfig(tensor_parallel_size=2).distributed_executor_backend == "ray", "refuses bundles of two GPUs"
    args = engine_args(checkpoint("qwen3_tied"), monkeypatch, tensor_parallel_size=2)
    names = ("tensor_parallel_size", "distributed_executor_backend")
    config = ParallelConfig(**{name: args[name] for name in names})
    assert config.distributed_executor_backend == "mp"
