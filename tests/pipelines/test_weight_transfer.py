"""Which backend the weight transfer selects, and which choices the plan refuses."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import parse_problem

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.pipelines.weight_transfer import transfer_choice, transfer_problems, transfer_text, transfer_warnings

KEY = "weight_transfer.backend"
LORA = "actor_train.model_args.lora"
VLLM = ("strategy=hf", "actor_infer.strategy_args={strategy_name:vllm}")
TRAIN, INFER = "actor_train.device_mapping='{}'", "actor_infer.device_mapping='{}'"


def config_of(trainer: str, engines: str, *overrides: str) -> ExperimentConfig:
    """An example whose trainer and engines have these devices, in worker processes."""
    devices = TRAIN.format(trainer), INFER.format(engines)
    return load_config("example_gspo", "execution=ray", *devices, *overrides).config


@pytest.mark.parametrize(
    ("trainer", "engines", "on_cuda", "backend", "reason"),
    [
        ("0-1", "0-1", True, "ipc", "every engine shares"),
        ("0-1", "0", True, "ipc", "every engine shares"),
        ("0-1", "2-3", True, "nccl", "separate GPUs"),
        ("0-1", "1-2", True, "nccl", "no engine is on the GPU that sends"),
        ("0-1", "0-2", True, "gloo", "any layout"),
        ("0-1", "2-3", False, "gloo", "no GPUs"),
        ("0-1", "0-1", False, "gloo", "no GPUs"),
    ],
)
def test_auto_selects_the_fastest_that_the_devices_allow(
    trainer: str, engines: str, on_cuda: bool, backend: str, reason: str
) -> None:
    config = config_of(trainer, engines)
    choice = transfer_choice(config, on_cuda)
    assert choice.backend == backend and reason in choice.reason
    assert transfer_text(config, on_cuda) == f"{backend} ({choice.reason})"
    assert [*transfer_problems(config, on_cuda)] == []
    warned = [warning.key for warning in transfer_warnings(config, on_cuda)]
    assert warned == ([KEY] if on_cuda and backend == "gloo" else [])


def test_an_engine_without_gpu_transfers_gets_gloo() -> None:
    config = config_of("0", "1", "strategy=hf")
    assert transfer_choice(config, True).backend == "gloo"
    (problem,) = transfer_problems(config_of("0", "1", "strategy=hf", f"{KEY}=nccl"), True)
    assert parse_problem(str(problem)).names("nccl", "hf_infer", "set gloo")


@pytest.mark.parametrize(
    ("trainer", "engines", "selected", "on_cuda", "values"),
    [
        ("0-1", "2-3", "ipc", True, ("ipc", "2-3", "set nccl")),
        ("0-1", "0-2", "ipc", True, ("ipc", "2", "set gloo")),
        ("0-1", "0-1", "nccl", True, ("nccl", "device 0", "set ipc")),
        ("0-1", "2-3", "nccl", False, ("nccl", "there are none", "set gloo")),
    ],
)
def test_backend_that_cannot_work_is_refused_with_the_nearest(
    trainer: str, engines: str, selected: str, on_cuda: bool, values: tuple[str, ...]
) -> None:
    (problem,) = transfer_problems(config_of(trainer, engines, f"{KEY}={selected}"), on_cuda)
    parsed = parse_problem(str(problem))
    assert parsed.key == KEY and parsed.names(*values)


def test_valid_selections_run_and_slow_ones_are_warned_about() -> None:
    for trainer, engines, selected in (("0-1", "0-1", "ipc"), ("0-1", "2-3", "nccl"), ("0-1", "0-1", "gloo")):
        config = config_of(trainer, engines, f"{KEY}={selected}")
        assert [*transfer_problems(config, True)] == [*transfer_problems(config, None)] == []
        assert transfer_choice(config, True).backend == selected
    (warning,) = transfer_warnings(config, True)
    assert parse_problem(str(warning)).names("gloo", "set ipc")


def test_checksums_are_refused_unless_gloo_sends() -> None:
    config = config_of("0", "1", "weight_transfer.checksum=true")
    assert [*transfer_problems(config, False)] == [*transfer_problems(config, None)] == []
    (problem,) = transfer_problems(config, True)
    assert problem.key == "weight_transfer.checksum" and parse_problem(str(problem)).names("gloo", "nccl")


def test_unknown_devices_show_both_choices() -> None:
    assert transfer_text(config_of("0", "1"), None) == "on GPUs nccl (separate GPUs), else gloo (no GPUs)"


def test_one_process_passes_tensors_by_reference() -> None:
    plan = make_plan(load_config("example_gspo").config)
    assert ("weights", "passed by reference in one process") in plan.rows
    refused = make_plan(load_config("example_gspo", f"{KEY}=ipc").config).not_runnable
    (problem,) = [problem for problem in refused if problem.key == KEY]
    assert parse_problem(str(problem)).names("ipc", "execution: local", "set auto")


@pytest.mark.parametrize("selected", ["auto", "nccl"])
def test_adapters_travel_through_host_memory(selected: str) -> None:
    config = config_of("0", "1", *VLLM, f"{LORA}.rank=8", f"{KEY}={selected}")
    assert config.sends_adapters
    assert transfer_choice(config, True).backend == "gloo"
    assert [*transfer_problems(config, True), *transfer_warnings(config, True)] == []
    assert transfer_text(config, True) == "the adapter alone, by gloo through host memory"
    merged = config_of("0", "1", *VLLM, f"{LORA}.rank=8", f"{LORA}.sync=merged")
    assert not merged.sends_adapters and transfer_choice(merged, True).backend == "nccl"


def test_adapters_that_vllm_cannot_hold_are_named() -> None:
    (problem,) = transfer_problems(config_of("0", "1", *VLLM, f"{LORA}.rank=600"), None)
    assert problem.key == f"{LORA}.rank" and parse_problem(str(problem)).names("600", "512", "sync: merged")
    config = config_of("0", "1", *VLLM, f"{LORA}.rank=8", "model=tiny_qwen3_moe")
    (problem,) = transfer_problems(config, False)
    assert problem.key == f"{LORA}.sync" and parse_problem(str(problem)).names("adapter", "CPU", "set merged")
    assert [*transfer_problems(config, True)] == []
