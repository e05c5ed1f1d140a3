"""Memory in the plan: the phases of every device, measured peaks, and proposals that fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.config.memory import PassSize
from roll_gspo.config.sft import AnyConfig
from roll_gspo.models.size import architecture_of
from roll_gspo.pipelines import gpu_memory
from roll_gspo.pipelines.gpu_memory import GpuMemory
from roll_gspo.pipelines.memory import CONTEXT, GIB, Memory, estimate_memory, role_states, state_bytes
from roll_gspo.pipelines.memory_fit import changed
from roll_gspo.pipelines.memory_rows import memory_problems, memory_texts
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.pipelines.sharing import sharing_problems
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.memory import pass_bytes
from roll_gspo.strategies.residency import Phase

STRATEGY = "actor_train.strategy_args.strategy_config"
ENGINE = "actor_infer.strategy_args.strategy_config"
TRAINING = "actor_train.training_args"
UNFUSED = MegatronConfig(bias_activation_fusion=False)
SEPARATE = "layout=qwen2.5_7b-separate"
NO_RECOMPUTE = tuple(f"{STRATEGY}.recompute_{key}=null" for key in ("granularity", "method", "num_layers"))
SMALL = ("layout=single", "pretrain=Qwen/Qwen3-0.6B", "gpu_memory_gb=80")


def config_of(example: str, *overrides: str) -> AnyConfig:
    return load_config(example, *overrides).config


def memory_of(config: AnyConfig, gib: float = 80) -> Memory:
    memory = estimate_memory(config, gib * GIB)
    assert memory is not None
    return memory


@pytest.mark.parametrize(("samples", "update", "score"), [(8, 17.2, 5.8), (32, 37.0, 6.2)])
def test_estimate_is_the_peak_that_was_measured_on_an_h200(samples: int, update: float, score: float) -> None:
    """Compare with Qwen3-0.6B, 128 + 384 tokens, megatron-core in bf16 without fusions (docs/gpu.md)."""
    model = architecture_of("Qwen/Qwen3-0.6B")
    config = config_of("qwen2.5_7b_gspo", *SMALL)
    states = role_states(config, config.actor_train)
    assert model is not None and states is not None
    size = PassSize(512 * samples, 384 * samples)
    trained = pass_bytes(model, UNFUSED, 0, size, 2, train=True, head=True)
    assert (sum(states[0]) + sum(trained)) / GIB == pytest.approx(update, rel=0.03)
    # The moments did not exist yet: they are made by the first update.
    before = states[0].weights + states[0].gradients + states[0].optimizer / 3
    scored = pass_bytes(model, UNFUSED, 0, size, 2, train=False, head=True)
    assert (before + sum(scored)) / GIB == pytest.approx(score, rel=0.03)


def test_roles_of_a_shared_device_take_turns() -> None:
    memory = memory_of(config_of("qwen2.5_7b_gspo", *SMALL))
    roles = {phase: of_devices[0] for phase, of_devices in memory.phases.items()}
    weights = 596049920 * 2
    assert roles[Phase.GENERATING]["actor_train"].total == roles[Phase.GENERATING]["reference"].total == 0
    assert roles[Phase.GENERATING]["actor_infer"].weights == weights
    scoring = roles[Phase.SCORING]
    assert sorted([scoring["actor_train"].weights, scoring["reference"].weights]) == [0, weights], "one at a time"
    assert not scoring["actor_train"].optimizer and not scoring["actor_infer"].kv_cache
    assert (
        roles[Phase.TRAINING]["actor_train"].optimizer == 6 * weights and roles[Phase.TRAINING]["reference"].total == 0
    )
    assert roles[Phase.SYNCING]["actor_infer"].weights == roles[Phase.SYNCING]["actor_train"].weights == weights
    assert not roles[Phase.SYNCING]["actor_train"].gradients and roles[Phase.SYNCING]["actor_train"].buffers > 0
    assert memory.contexts == {0: CONTEXT}, "one process"


def test_roles_on_separate_devices_stay_there() -> None:
    memory = memory_of(config_of("qwen2.5_7b_gspo", SEPARATE))
    for of_devices in memory.phases.values():
        assert of_devices[0]["actor_train"].optimizer and of_devices[6]["actor_infer"].kv_cache
        assert list(of_devices[4]) == ["reference"]


def test_buckets_of_a_weight_transfer_depend_on_the_backend() -> None:
    def buffers(*overrides: str) -> float:
        memory = memory_of(config_of("qwen2.5_7b_gspo", *overrides))
        return memory.phases[Phase.SYNCING][0]["actor_train"].buffers

    embedding = 152064 * 3584 * 2
    assert buffers() == embedding + 2 * GIB, "ipc"
    assert buffers("weight_transfer.bucket_mb=512") == embedding + GIB / 2
    assert buffers(SEPARATE) == embedding + GIB, "nccl has two of 512 MiB"
    assert buffers(SEPARATE, "weight_transfer.backend=gloo") == embedding, "in host memory"


def test_engine_fills_its_share_of_the_device() -> None:
    config = config_of("qwen2.5_7b_gspo", SEPARATE)
    parts = memory_of(config, 100).phases[Phase.GENERATING][6]["actor_infer"]
    assert parts.total / GIB == pytest.approx(85)
    (found, _) = memory_of(config, 100).roles["actor_infer"].generation or ()
    assert found.num_tokens == int(parts.kv_cache / (2 * 28 * 4 * 128 * 2)), "28 layers, 4 heads of 128, bf16"
    fixed = memory_of(config_of("qwen2.5_7b_gspo", SEPARATE, f"{ENGINE}.kv_cache_memory_mb=2048"))
    assert fixed.phases[Phase.GENERATING][6]["actor_infer"].kv_cache == 2 * GIB


def test_activations_grow_with_the_micro_batch_and_shrink_with_parallel_sizes() -> None:
    def activations(*overrides: str) -> float:
        config = config_of("qwen2.5_7b_gspo", SEPARATE, *NO_RECOMPUTE, *overrides)
        return memory_of(config).phases[Phase.TRAINING][0]["actor_train"].activations

    budget = "actor_train.max_tokens_per_microbatch_in_train"
    one = activations(f"{budget}=6144")
    assert activations(f"{budget}=12288") == pytest.approx(2 * one)
    assert activations() == pytest.approx(one * 16384 / 6144), "packed on GPUs"
    padded = (f"{STRATEGY}.use_sequence_packing=false", f"{TRAINING}.per_device_train_batch_size=2")
    assert activations(*padded, f"{TRAINING}.gradient_accumulation_steps=32") == pytest.approx(2 * one)
    assert activations(f"{budget}=6144", f"{STRATEGY}.bias_activation_fusion=false") > 1.4 * one
    four = (f"{STRATEGY}.tensor_model_parallel_size=4", f"{TRAINING}.gradient_accumulation_steps=128")
    four = (f"{budget}=6144", *four)
    assert activations(*four) == pytest.approx(one / 2, rel=0.05), "the residual stream is not split while computing"
    stages = (*four[:1], *four[2:], f"{STRATEGY}.pipeline_model_parallel_size=2")
    assert activations(*stages) == pytest.approx(one, rel=0.03), "the first stage keeps two micro-batches"


@pytest.mark.parametrize(
    ("example", "overrides", "num_devices"),
    [
        ("qwen3_0.6b_gspo", (), 1),
        ("qwen2.5_7b_gspo", (), 8),
        ("qwen2.5_7b_gspo", (SEPARATE,), 8),
        ("qwen3_30b_a3b_gspo", (), 16),
        ("qwen3_30b_a3b_gspo", ("layout=qwen3_30b_a3b-separate",), 24),
    ],
)
def test_shipped_examples_fit_80_gb(example: str, overrides: tuple[str, ...], num_devices: int) -> None:
    config = config_of(example, "gpu_memory_gb=80", *overrides)
    assert memory_problems(config, GpuMemory(80, "gpu_memory_gb")) == []
    memory = memory_of(config)
    assert len(memory.contexts) == num_devices
    assert 40 * GIB < memory.total(*memory.fullest()) < 75 * GIB, "the GPUs are used, with room for surprises"
    (found, *_) = memory.roles["actor_infer"].generation or ()
    assert found.num_tokens > 64 * config_of(example).max_sequence_length
    sharing_problems_found = [*sharing_problems(config, on_cuda=True)]
    assert sharing_problems_found == [] and config.mini_batch_size == 128 and config.updates_per_rollout == 4


@pytest.mark.parametrize("example", ["qwen3_0.6b_gspo", "qwen2.5_7b_gspo", "qwen3_30b_a3b_gspo"])
def test_smaller_gpus_get_a_proposal_for_the_examples(example: str) -> None:
    gpu = GpuMemory(24 if "0.6b" in example else 48, "gpu_memory_gb")
    (problem,) = memory_problems(config_of(example), gpu)
    found = re.search(r"; set (.+) \(then", problem.message)
    assert found is not None, problem.message
    assert memory_problems(config_of(example, *shlex.split(found[1])), gpu) == []


TOO_LARGE = {
    "no recompute": ("qwen2.5_7b_gspo", (SEPARATE, *NO_RECOMPUTE)),
    "one device": ("qwen2.5_7b_gspo", ("layout=single", "pretrain=Qwen/Qwen3-4B")),
    "cache": (
        "qwen2.5_7b_gspo",
        (
            SEPARATE,
            f"{ENGINE}.kv_cache_memory_mb=90000",
        ),
    ),
    "no room for the cache": ("qwen2.5_7b_gspo", (f"{ENGINE}.gpu_memory_utilization=0.2",)),
    "reference": (
        "qwen2.5_7b_gspo",
        (
            SEPARATE,
            "reference.max_tokens_per_microbatch_in_infer=1500000",
        ),
    ),
    "experts": (
        "qwen3_30b_a3b_gspo",
        (f"{STRATEGY}.expert_model_parallel_size=2", f"{STRATEGY}.use_distributed_optimizer=false"),
    ),
    "tokens": (
        "qwen2.5_7b_gspo",
        (
            "strategy=hf",
            *SMALL,
            f"{TRAINING}.per_device_train_batch_size=32",
            f"{TRAINING}.gradient_accumulation_steps=4",
        ),
    ),
}


@pytest.mark.parametrize("name", sorted(TOO_LARGE))
def test_too_large_settings_are_refused_with_a_proposal_that_fits(name: str) -> None:
    example, overrides = TOO_LARGE[name]
    overrides = tuple(dict.fromkeys((*overrides, "gpu_memory_gb=80")))
    (problem,) = memory_problems(config_of(example, *overrides), GpuMemory(80, "gpu_memory_gb"))
    assert "80 GiB (gpu_memory_gb)" in problem.message
    found = re.search(r"; set (.+) \(then about ([\d.]+) GiB\)$", problem.message)
    assert found is not None, problem.message
    proposal = tuple(shlex.split(found[1]))
    assert problem.key == proposal[0].partition("=")[0]
    config = config_of(example, *overrides, *proposal)
    assert memory_problems(config, GpuMemory(80, "gpu_memory_gb")) == []
    memory = memory_of(config)
    assert memory.total(*memory.fullest()) / GIB == pytest.approx(float(found[2]), abs=0.1)
    before = config_of(example, *overrides)
    assert config.mini_batch_size == before.mini_batch_size


def test_more_devices_are_asked_for_if_nothing_fits() -> None:
    config = config_of("qwen2.5_7b_gspo", "layout=single", "gpu_memory_gb=80")
    (problem,) = memory_problems(config, GpuMemory(80, "gpu_memory_gb"))
    assert problem.key == "actor_train.device_mapping" and problem.message.endswith("name more devices")


def test_assumed_memory_gives_a_warning_and_known_memory_a_problem() -> None:
    overrides = (SEPARATE, *NO_RECOMPUTE)
    assumed = make_plan(config_of("qwen2.5_7b_gspo", *overrides))
    key = "actor_train.max_tokens_per_microbatch_in_train"
    assert [warning.key for warning in assumed.warnings if "assumed" in warning.message] == [key]
    assert assumed.not_runnable == ()
    known = make_plan(config_of("qwen2.5_7b_gspo", "gpu_memory_gb=80", *overrides))
    assert [problem.key for problem in known.not_runnable] == [key]
    assert make_plan(config_of("qwen2.5_7b_gspo", "gpu_memory_gb=500", *overrides)).not_runnable == ()


def test_changes_that_break_a_rule_are_no_configuration() -> None:
    config = config_of("qwen2.5_7b_gspo", SEPARATE)
    assert changed(config, {f"{STRATEGY}.tensor_model_parallel_size": 3}) is None
    found = changed(config, {f"{STRATEGY}.tensor_model_parallel_size": 1, f"{STRATEGY}.sequence_parallel": False})
    assert found is not None and found.data_parallel_size == 4 and config.data_parallel_size == 2


def test_memory_of_the_machine_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("qwen2.5_7b_gspo")
    monkeypatch.setattr(gpu_memory, "detected_gb", lambda: 140.4)
    assert gpu_memory.gpu_memory(config, True) == (140.4, "nvidia-smi")
    assert gpu_memory.gpu_memory(config, False) == (80, "assumed")
    assert gpu_memory.gpu_memory(config_of("qwen2.5_7b_gspo", "gpu_memory_gb=40"), True) == (40, "gpu_memory_gb")


def test_driver_reports_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 143771\necho 81559\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu_memory.detected_gb.cache_clear()
    assert gpu_memory.detected_gb() == pytest.approx(79.6, abs=0.1)
    program.write_text("#!/bin/sh\nexit 9\n")
    gpu_memory.detected_gb.cache_clear()
    assert gpu_memory.detected_gb() is None
    gpu_memory.detected_gb.cache_clear()


def test_table_has_a_column_per_phase_and_a_row_per_group_of_devices() -> None:
    head, *rows = memory_texts(config_of("qwen2.5_7b_gspo", SEPARATE), GpuMemory(80, "assumed"), None)
    assert head.split()[3:7] == list(Phase) and head.endswith("of 80 GiB (assumed; set gpu_memory_gb)")
    assert [row.split("  ")[0].strip() for row in rows[:3]] == ["devices 0-3", "devices 4-5", "devices 6-7"]
    assert [row.split(":")[0] for row in rows[3:]] == [
        "actor_train training",
        "actor_infer generating",
        "reference scoring",
    ]
    assert (
        "sequences of 6,144" in rows[4]
        and "main memory" not in rows[-1]
        and "16,384 positions per micro-batch" in rows[3]
    )


def test_states_of_shared_devices_need_main_memory() -> None:
    config = config_of("qwen3_0.6b_gspo")
    text = memory_texts(config, GpuMemory(80, "assumed"), None)[-1]
    needed = 596049920 * (2 + 12 + 2) / GIB  # weights and optimizer of the trainer, weights of the reference
    assert text.startswith(f"main memory of a machine: {needed:.0f} GiB ")
    alone = memory_texts(config_of("qwen3_0.6b_gspo", "offload_states=false"), GpuMemory(80, "assumed"), None)
    assert "main memory" not in alone[-1]


def test_builtin_model_on_a_cpu_has_no_plan_for_gpus() -> None:
    config = config_of("example_gspo")
    (text,) = memory_texts(config, GpuMemory(80, "assumed"), False)
    states = state_bytes(config)
    assert states is not None and text.startswith(f"about {states[0] / GIB:.3g} GiB ")
    assert len(memory_texts(config, GpuMemory(80, "assumed"), True)) > 3
