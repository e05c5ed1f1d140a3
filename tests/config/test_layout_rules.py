"""Keys of layouts and execution: what is refused whatever the model, and ROLL's own names for the same."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import problem_of

STRATEGY = "actor_train.strategy_args.strategy_config"
TP = f"{STRATEGY}.tensor_model_parallel_size=2"
PP = f"{STRATEGY}.pipeline_model_parallel_size=2"
TWO = "actor_train.device_mapping=[0,1]"
MOE = "model=tiny_qwen3_moe"
BUDGET = "max_tokens_per_microbatch_in"
SWITCH = "use_dynamic_batching_in"


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        (
            (f"{STRATEGY}.virtual_pipeline_model_parallel_size=2",),
            "actor_train.strategy_args.strategy_config.virtual_pipeline_model_parallel_size",
            ("2", "null", "pipeline_model_parallel_size"),
        ),
        (
            (TWO, PP, f"{STRATEGY}.virtual_pipeline_model_parallel_size=1"),
            "actor_train.strategy_args.strategy_config.virtual_pipeline_model_parallel_size",
            ("1", "null", "2"),
        ),
        (
            (f"{STRATEGY}.sequence_parallel=true",),
            "actor_train.strategy_args.strategy_config.sequence_parallel",
            ("true", "false", "tensor_model_parallel_size"),
        ),
        (
            (TWO, TP, MOE, f"{STRATEGY}.sequence_parallel=true", f"{STRATEGY}.expert_tensor_parallel_size=1"),
            "actor_train.strategy_args.strategy_config.expert_tensor_parallel_size",
            ("1", "tensor_model_parallel_size", "2"),
        ),
        (
            (TWO, PP, MOE, f"{STRATEGY}.moe_token_dispatcher_type=allgather"),
            "actor_train.strategy_args.strategy_config.moe_token_dispatcher_type",
            ("allgather", "pipeline_model_parallel_size", "2", "alltoall"),
        ),
        (
            (f"{STRATEGY}.overlap_param_gather=true", f"{STRATEGY}.overlap_grad_reduce=true"),
            f"{STRATEGY}.overlap_param_gather",
            ("true", "use_distributed_optimizer: true"),
        ),
        (
            ("reference.strategy_args.strategy_config.grad_reduce_in_fp32=false",),
            "reference.strategy_args.strategy_config.grad_reduce_in_fp32",
            ("megatron_train",),
        ),
        ((TP,), "actor_train.device_mapping", ("1", "2", "tensor_model_parallel_size")),
        (
            ("actor_train.device_mapping='0-4'", TP),
            "actor_train.device_mapping",
            ("5", "2", "4 or 6"),
        ),
        (
            ("strategy=hf", f"actor_train.{BUDGET}_infer=100"),
            "actor_train.max_tokens_per_microbatch_in_infer",
            ("hf_train", "infer_batch_size"),
        ),
        (("reference.max_tokens_per_microbatch_in_infer=0",), "reference.max_tokens_per_microbatch_in_infer", ("0",)),
        (("weight_transfer.bucket_mb=0",), "weight_transfer.bucket_mb", ("0",)),
        (("num_nodes=0",), "num_nodes", ("0",)),
    ],
)
def test_impossible_layout_is_refused(overrides: tuple[str, ...], key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(*overrides)
    assert problem.where.startswith("command line (")
    assert problem.key == key and problem.names(*values)


@pytest.mark.parametrize(
    ("overrides", "splits"),
    [
        ((TWO, TP), ("tensor_model_parallel_size: 2",)),
        ((TWO, TP, f"{STRATEGY}.sequence_parallel=true"), ("tensor_model_parallel_size: 2", "sequence_parallel: true")),
        ((TWO, PP), ("pipeline_model_parallel_size: 2",)),
        ((TWO, f"{STRATEGY}.context_parallel_size=2"), ("context_parallel_size: 2",)),
        ((f"{STRATEGY}.use_sequence_packing=true",), ("use_sequence_packing: true",)),
        ((f"{STRATEGY}.moe_router_fusion=true",), ("moe_router_fusion: true",)),
    ],
)
@pytest.mark.parametrize(("option", "key", "value"), [("R2", "mode", "R2"), ("record", "record", "true")])
def test_replay_is_refused_where_tokens_or_layers_are_cut(
    overrides: tuple[str, ...], splits: tuple[str, ...], option: str, key: str, value: str
) -> None:
    problem = problem_of(MOE, f"router_replay={option}", *overrides)
    assert problem.key == f"actor_train.router_replay.{key}" and problem.names(value, *splits)


def test_replay_goes_with_data_and_expert_parallelism() -> None:
    experts = f"{STRATEGY}.expert_model_parallel_size=2"
    config = load_config("example_gspo", MOE, "router_replay=R2", TWO, experts, "execution=ray").config
    assert config.data_parallel_size == 2


def test_keys_of_execution_have_their_values() -> None:
    config = load_config("example_gspo").config
    assert (config.num_nodes, config.worker_timeout_s, config.max_restarts, config.max_worker_restarts) == (
        *(None, 1800),
        *(0, 3),
    )
    transfer = {"backend": "auto", "checksum": False, "bucket_mb": None, "timeout_s": 120}
    assert config.weight_transfer.model_dump() == transfer
    assert not config.checkpoint_config.async_save
    own = load_config("example_gspo", "weight_transfer.checksum=true", "checkpoint_config.async_save=true").config
    assert own.weight_transfer.checksum and own.checkpoint_config.async_save and own.weight_transfer.bucket_mb is None


@pytest.mark.parametrize(
    ("role", "phase"), [("actor_train", "train"), ("actor_train", "infer"), ("reference", "infer")]
)
def test_rolls_dynamic_batching_is_its_budget(role: str, phase: str) -> None:
    budget, switch = f"{role}.{BUDGET}_{phase}=900", f"{role}.{SWITCH}_{phase}"
    for overrides, value, num_warnings in (
        ((budget,), 900, 0),
        ((budget, f"+{switch}=true"), 900, 0),
        ((budget, f"+{switch}=false"), None, 1),
        ((f"+{switch}=false",), None, 0),
    ):
        loaded = load_config("example_gspo", *overrides)
        assert loaded.config.model_dump()[role][f"{BUDGET}_{phase}"] == value
        assert len(loaded.warnings) == num_warnings
        assert all(f"{SWITCH}_{phase}: false switches it off" in warning for warning in loaded.warnings)
    problem = problem_of(f"+{switch}=true")
    assert problem.key == switch and problem.names(f"{BUDGET}_{phase}")


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        (
            f"+{STRATEGY}.optimizer_cpu_offload=true",
            "actor_train.strategy_args.strategy_config.optimizer_cpu_offload",
            ("use_distributed_optimizer",),
        ),
        (f"+{STRATEGY}.tp_comm_overlap=true", f"{STRATEGY}.tp_comm_overlap", ("length",)),
        (f"+{STRATEGY}.use_precision_aware_optimizer=true", f"{STRATEGY}.use_precision_aware_optimizer", ("16 bits",)),
        (f"+{STRATEGY}.recompute_modules=[mlp]", "actor_train.strategy_args.strategy_config.recompute_modules", ()),
        (
            "+actor_train.use_sequence_packing=true",
            "actor_train.use_sequence_packing",
            ("strategy_args.strategy_config.use_sequence_packing",),
        ),
        ("+actor_train.world_size=2", "actor_train.world_size", ("device_mapping", "2")),
    ],
)
def test_unsupported_key_is_refused_with_its_replacement(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(override)
    assert problem.message.startswith("not supported yet: ")
    assert problem.key == key and problem.names(*values)


def test_engines_and_the_reference_do_not_take_budgets_of_training() -> None:
    loaded = load_config("example_gspo", f"+actor_infer.{BUDGET}_infer=5", f"+reference.{BUDGET}_train=5")
    assert len(loaded.warnings) == 2


def test_critic_takes_the_budgets_of_the_actor() -> None:
    config = load_config("example_gspo", "adv_estimator=gae", f"actor_train.{BUDGET}_train=700").config
    assert config.critic is not None and config.critic.max_tokens_per_microbatch_in_train == 700
