"""Devices of the roles: problems, layout texts and memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from composed import load_config
from config_problems import ConfigProblem, parse_problem
from tiny_models import DEEPER

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.devices import device_problems, finds_cuda, layout_text
from roll_gspo.pipelines.memory import role_states, state_bytes
from roll_gspo.pipelines.memory_rows import main_memory_warnings
from roll_gspo.pipelines.plan import make_plan

STRATEGY = "actor_train.strategy_args.strategy_config"
ENGINE = "actor_infer.strategy_args.strategy_config.tensor_parallel_size"
RAY = "execution=ray"


def config_of(*overrides: str, example: str = "example_gspo") -> ExperimentConfig:
    """A shipped example with overrides."""
    return load_config(example, *overrides).config


def problems(*overrides: str, on_cuda: bool | None = False, example: str = "example_gspo") -> list[ConfigProblem]:
    """Device problems of a shipped example with overrides."""
    return [parse_problem(str(problem)) for problem in device_problems(config_of(*overrides, example=example), on_cuda)]


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        (("actor_infer.device_mapping=[0,1]",), "actor_infer.device_mapping", ("2", "execution: ray")),
        (("reference.device_mapping=[1]",), "reference.device_mapping", ("1", "CUDA_VISIBLE_DEVICES")),
        ((f"{ENGINE}=2",), ENGINE, ("2", "execution: ray")),
        (
            (RAY, f"{ENGINE}=2", "actor_infer.device_mapping='0-2'"),
            "actor_infer.device_mapping",
            ("3", "tensor_parallel_size 2", "name 2 or 4"),
        ),
        (
            (RAY, f"{ENGINE}=3", "actor_infer.device_mapping='0-2'"),
            ENGINE,
            ("3", "4 attention heads", "2 key/value heads", "set tensor_parallel_size to"),
        ),
        (
            (RAY, f"{ENGINE}=2", "actor_infer.device_mapping=[1,2]", "num_gpus_per_node=2"),
            "actor_infer.device_mapping",
            ("1-2", "num_gpus_per_node 2"),
        ),
        ((RAY, "reference.device_mapping=[0,1]", "strategy=hf"), "reference.device_mapping", ("2", "hf_infer")),
        ((RAY, "actor_train.device_mapping=[0,1]", "strategy=hf"), "actor_train.device_mapping", ("2", "hf_train")),
        (
            (RAY, "actor_infer.device_mapping=[9]", "num_nodes=1"),
            "num_nodes",
            ("device 9", "machine 1 of 1", "num_nodes: 2"),
        ),
        (
            (RAY, "actor_infer.device_mapping=[0,1]", "num_gpus_per_node=0"),
            "num_gpus_per_node",
            ("0", "device 1", "2 for one machine"),
        ),
        (
            (RAY, "reference.strategy_args.strategy_config.tensor_model_parallel_size=2"),
            "reference.strategy_args.strategy_config.tensor_model_parallel_size",
            ("2", "1 rank"),
        ),
        (
            (RAY, "actor_train.device_mapping='0-3'", f"{STRATEGY}.tensor_model_parallel_size=4"),
            f"{STRATEGY}.tensor_model_parallel_size",
            ("4", "2 key/value heads", "to 2"),
        ),
    ],
)
def test_impossible_devices_are_refused(overrides: tuple[str, ...], key: str, values: tuple[str, ...]) -> None:
    (problem,) = problems(*overrides)
    assert problem.key == key and problem.names(*values)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("actor_train.device_mapping=[0]", "actor_infer.device_mapping='0'"),
        (RAY,),
        ("layout=two_ranks",),
        (RAY, "actor_infer.device_mapping=[0,1]", "strategy=hf"),
        (RAY, f"{ENGINE}=2"),
        (RAY, "actor_infer.device_mapping=[9]", "num_nodes=2"),
    ],
)
def test_roles_may_share_worker_slots(overrides: tuple[str, ...]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize("example", ["qwen2.5_7b_gspo", "qwen3_30b_a3b_gspo"])
def test_shipped_layouts_run_on_gpus(example: str) -> None:
    found = problems(on_cuda=True, example=example)
    if importlib.util.find_spec("transformer_engine") is None:
        grouped = [f"{role}.strategy_args.strategy_config.moe_grouped_gemm" for role in ("actor_train", "reference")]
        assert [problem.key for problem in found] == (grouped if "30b" in example else [])
        assert all(problem.names("roll-gspo[te]") for problem in found)
    else:
        assert found == []
    config = config_of(example=example)
    on_cpu = problems(on_cuda=False, example=example)
    assert all(problem.key.endswith("moe_grouped_gemm") and problem.names("CUDA") for problem in on_cpu)
    assert len(on_cpu) == (2 if "30b" in example else 0)
    (warning,) = main_memory_warnings(config, on_cuda=False)
    assert warning.key == "actor_train.device_mapping"
    assert main_memory_warnings(config, on_cuda=True) == main_memory_warnings(config, on_cuda=None) == []


def test_kernels_of_the_whole_process_need_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "actor_infer.strategy_args.strategy_config.batch_invariant"
    (problem,) = problems(f"{key}=true", on_cuda=True)
    assert problem.key == key and problem.names("execution: ray", "set it to false")
    apart = (RAY, f"{key}=true", "actor_infer.device_mapping=[1]", "reference.device_mapping=[2]")
    assert problems(*apart, on_cuda=True) == []
    (problem,) = problems(*apart, on_cuda=False)
    assert problem.key == key and problem.names("needs GPUs")


def test_model_of_a_local_folder_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DEEPER["four_layers"][1].to_dict(), "head_dim": 32}))
    layout = (f"{STRATEGY}.pipeline_model_parallel_size=3", "actor_train.device_mapping='0-2'", RAY)
    batch = ("rollout_batch_size=33", "actor_train.training_args.gradient_accumulation_steps=1", "warm_start=null")
    batch = (*batch, "actor_train.training_args.per_device_train_batch_size=4")
    (problem,) = problems(f"pretrain={tmp_path}", *layout, *batch)
    assert problem.key == f"{STRATEGY}.pipeline_model_parallel_size" and problem.names("3", "4 layers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found = device_problems(config_of(f"pretrain={tmp_path}", "warm_start=null"), False)
    assert (
        len(found) == 2
        and {problem.key for problem in found} == {"pretrain"}
        and all("gpt2" in str(problem) for problem in found)
    )


def test_layout_text_has_machines_and_every_size() -> None:
    config = config_of(example="qwen3_30b_a3b_gspo")
    trainer, engine = layout_text(config, config.actor_train), layout_text(config, config.actor_infer)
    assert trainer == "devices 0-15 on machines 0-1, TP 4 + SP · PP 2 · CP 1 · EP 8 · ETP 1 · DP 2"
    assert engine == "devices 0-15 on machines 0-1, TP 4 · 4 engine(s)"
    virtual = (RAY, "actor_train.device_mapping=[0,1]", f"{STRATEGY}.pipeline_model_parallel_size=2")
    config = config_of(*virtual, f"{STRATEGY}.virtual_pipeline_model_parallel_size=2")
    assert layout_text(config, config.actor_train) == "devices 0-1, TP 1 · PP 2 · VPP 2 · CP 1 · EP 1 · DP 1"


def test_memory_differs_between_pipeline_stages() -> None:
    pipeline = (RAY, "actor_train.device_mapping=[0,1]", f"{STRATEGY}.pipeline_model_parallel_size=2")
    config = config_of(*pipeline, "actor_infer.device_mapping=[2]", "reference.device_mapping=[2]")
    states, devices = role_states(config, config.actor_train), state_bytes(config)
    assert states is not None and devices is not None
    first, last = (sum(of_device) for of_device in states)
    assert last - first == 128 * (4 + 4 + 8), "both hold the tied embedding, the last one the final norm too"
    assert devices[0] == first and devices[1] == last and devices[2] < first


def test_keys_without_effect_give_a_warning() -> None:
    warned = [
        warning.key
        for overrides in (
            ("max_restarts=1",),
            ("weight_transfer.checksum=true",),
            ("num_nodes=1",),
            (RAY, "num_nodes=3"),
        )
        for warning in make_plan(config_of("loss_agg_mode=seq-mean-token-mean", *overrides)).warnings
    ]
    assert warned == ["max_restarts", "weight_transfer", "num_nodes", "num_nodes"]
    quiet = config_of("loss_agg_mode=seq-mean-token-mean", RAY, "max_restarts=1", "num_nodes=1")
    assert make_plan(quiet).warnings == ()


def test_gpus_are_detected_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert finds_cuda(config_of()) is False
    # several machines are a cluster, which this machine without GPUs may only plan
    assert finds_cuda(config_of(example="qwen3_30b_a3b_gspo")) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (finds_cuda(config_of()), finds_cuda(config_of(RAY))) == (False, None)
