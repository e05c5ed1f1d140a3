"""Packing and token budgets: null depends on the device, an explicit value wins, and the plan shows both."""

from __future__ import annotations

import pytest
from composed import load_config

from roll_gspo.config.roles import ReferenceConfig, TrainedRoleConfig
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.passes import pass_rows

STRATEGY = "strategy_args.strategy_config.use_sequence_packing"
BUDGET = "max_tokens_per_microbatch_in"
MOE = "model=tiny_qwen3_moe"


def resolved(name: str, on_cuda: bool, *overrides: str) -> tuple[bool, int | None, int | None]:
    """Return whether a role packs, and its budgets in training and scoring."""
    config = load_config("example_gspo", *overrides).config
    role = config.roles()[name]
    assert isinstance(role, TrainedRoleConfig | ReferenceConfig)
    found = role.on_device(on_cuda, model_of(config, role))
    in_train = found.max_tokens_per_microbatch_in_train if isinstance(found, TrainedRoleConfig) else None
    return found.strategy_args.packs_samples, in_train, found.max_tokens_per_microbatch_in_infer


@pytest.mark.parametrize(
    ("overrides", "on_gpus"),
    [
        ((), (True, 16_384, 32_768)),
        ((f"actor_train.{BUDGET}_train=8192", f"actor_train.{BUDGET}_infer=9000"), (True, 8_192, 9_000)),
        ((f"actor_train.{STRATEGY}=false",), (False, None, None)),
        (("strategy=hf",), (False, None, None)),
        (("strategy=fsdp2",), (True, 16_384, 32_768)),
        ((MOE, "router_replay=R2"), (False, None, None)),
        ((MOE, "router_replay=record"), (False, None, None)),
        ((MOE,), (True, 16_384, 32_768)),
    ],
)
def test_gpus_pack_samples_up_to_a_budget(
    overrides: tuple[str, ...], on_gpus: tuple[bool, int | None, int | None]
) -> None:
    assert resolved("actor_train", True, *overrides) == on_gpus


def test_cpus_keep_padding_and_counts_of_samples() -> None:
    for name in ("actor_train", "reference"):
        assert resolved(name, False) == (False, None, None)
    assert resolved("actor_train", False, f"actor_train.{STRATEGY}=true") == (True, None, None)
    assert resolved("actor_train", False, f"actor_train.{BUDGET}_train=900") == (False, 900, None)


def test_reference_and_critic_pack_as_the_trainer() -> None:
    assert resolved("reference", True) == (True, None, 32_768)
    assert resolved("reference", True, MOE, "router_replay=R2") == (True, None, 32_768)
    assert resolved("critic", True, "adv_estimator=gae") == (True, 16_384, 32_768)


def test_plan_shows_what_null_becomes() -> None:
    config = load_config("example_gspo", f"reference.{STRATEGY}=false").config
    text = "samples packed, up to 16384 tokens per training pass, 32768 tokens per scoring pass"
    assert list(pass_rows(config, True)) == [("passes", f"actor_train  {text}")]
    assert list(pass_rows(config, None)) == [("passes", f"actor_train  on GPUs: {text}")]
    assert list(pass_rows(config, False)) == []
