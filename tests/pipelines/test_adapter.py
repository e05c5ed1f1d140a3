"""Runs that train an adapter: plan, memory, disk, reference for free, resuming and export."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome, computed, metrics_of
from composed import load_config
from safetensors.torch import load_file

import roll_gspo.export
from roll_gspo.models.size import adapter_parameters
from roll_gspo.pipelines.disk import checkpoint_bytes
from roll_gspo.pipelines.memory import role_states, state_bytes
from roll_gspo.pipelines.plan import Plan, make_plan

Command = Callable[..., Outcome]
LORA = "actor_train.model_args.lora"
RANK = f"{LORA}.rank=8"
RL = ("--config-name", "example_gspo", "strategy=hf", RANK)
RUNS, SFT_RUNS = Path("out/example_gspo"), Path("out/example_sft")


def plan_of(name: str, *overrides: str) -> Plan:
    loaded = load_config(name, *overrides)
    return make_plan(loaded.config, loaded.warnings)


def rows(plan: Plan, label: str) -> str:
    return "\n".join(text for name, text in plan.rows if name == label)


def test_plan_says_what_is_trained_sent_and_not_built() -> None:
    plan = plan_of("example_gspo", "strategy=hf", "kl=loss", RANK, f"{LORA}.use_rslora=true")
    assert "rank 8, scale alpha 16 / √rank, on all-linear" in rows(plan, "adapter")
    assert "hf_infer receives all weights, with the adapter merged into them" in rows(plan, "adapter")
    assert "not built: actor_train without its adapter" in rows(plan, "roles")
    assert "reference: actor_train without its adapter" in rows(plan, "log-probs")
    assert not rows(plan_of("example_gspo", "strategy=hf"), "adapter")


def test_a_rate_of_all_weights_is_low_for_an_adapter() -> None:
    real = ("strategy=hf", "layout=single", "model=qwen3_0.6b", RANK)
    (warning,) = [w for w in plan_of("example_gspo", *real).warnings if "learning_rate" in w.key]
    assert warning.key == "actor_train.training_args.learning_rate" and "1e-05" in warning.message
    rate = "actor_train.training_args.learning_rate=1e-5"
    assert not [w for w in plan_of("example_gspo", *real, rate).warnings if "learning_rate" in w.key]


@pytest.mark.parametrize(
    ("model", "targets", "number"),
    [
        ("Qwen/Qwen3-0.6B", ("all-linear",), 28 * 8 * (3072 + 2048 + 2048 + 3072 + 3 * (1024 + 3072))),
        ("Qwen/Qwen3-0.6B", ("q_proj", "v_proj"), 28 * 8 * (3072 + 2048)),
        ("Some/Thing-2B", ("all-linear",), 20_000_000),
        ("Some/Thing", ("all-linear",), None),
    ],
)
def test_number_of_trained_parameters(model: str, targets: tuple[str, ...], number: int | None) -> None:
    assert adapter_parameters(model, 8, targets) == number


def test_memory_and_disk_are_of_the_adapter() -> None:
    config = load_config("example_gspo", "strategy=hf", "kl=loss", RANK).config
    adapter, model = adapter_parameters("builtin:tiny_qwen3", 8, ("all-linear",)), 625_024
    assert adapter is not None
    of_devices = role_states(config, config.actor_train)
    assert of_devices is not None
    (states,) = of_devices
    assert (states.weights, states.gradients, states.optimizer) == (4 * (model + adapter), 4 * adapter, 8 * adapter)
    assert state_bytes(config) == {0: sum(states) + 4 * model}, "no reference, and the engine's copy"
    assert checkpoint_bytes(config) == 12 * adapter + 4 * model
    assert sum(p.numel() for p in _tiny_adapter()) == adapter


def test_vllm_holds_every_version_that_may_be_in_flight() -> None:
    vllm = ("strategy=hf", "actor_infer.strategy_args={strategy_name:vllm}", "execution=ray")
    async_run = ("async_generation_ratio=2", "async_mode=in_flight")
    merged, plain, in_flight = (
        role_states(config, config.roles()["actor_infer"])
        for extra in ((f"{LORA}.sync=merged",), (), async_run)
        for config in [load_config("example_gspo", *vllm, f"{LORA}.rank=4", *extra).config]
    )
    adapter = adapter_parameters("builtin:tiny_qwen3", 8, ("all-linear",))  # vLLM's next rank after 4
    assert merged and plain and in_flight and adapter
    assert plain[0].weights - merged[0].weights == 2 * 4 * adapter
    assert in_flight[0].weights - merged[0].weights == 4 * 4 * adapter


def _tiny_adapter() -> list[torch.Tensor]:
    from roll_gspo.models.tiny import TINY_MODELS, build_model
    from roll_gspo.strategies.lora import Adapter
    from roll_gspo.strategies.lora_setup import LoraSetup

    return list(Adapter(build_model(TINY_MODELS["tiny_qwen3"], 0), LoraSetup(8, 16.0), 0).parameters().values())


def test_the_frozen_model_is_the_reference(command: Command, small: tuple[str, ...], pretrained: Path) -> None:
    kl = ("kl=loss", "max_steps=2", "checkpoint_config.max_ckpt_to_keep=0", "save_steps=1")
    shutil.copytree(pretrained, "another")
    for name, extra in (("free", ()), ("built", ("reference.model_args.model_name_or_path=another",))):
        outcome = command(*RL, *small, *kl, *extra, f"run_name={name}")
        assert outcome.code == 0, outcome.out + outcome.err
        assert ("start reference" in outcome.out) == (name == "built")
    free, built = computed(RUNS / "free"), computed(RUNS / "built")
    assert free == built and free[2]["actor/kl_loss"] > 0
    adapters = [
        load_file(RUNS / f"free/checkpoints/step_00000{step}/actor_train_hf/adapter/adapter_model.safetensors")
        for step in (1, 2)
    ]
    assert all(not tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items()), "every step trains"


def test_a_run_goes_on_bit_for_bit_and_is_exported(
    command: Command, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = (f"{LORA}.dropout=0.1", f"{LORA}.target_modules=[q_proj,up_proj]")
    assert command(*RL, *small, *dropped, "run_name=whole").code == 0
    first = RUNS / "whole/checkpoints/step_000002"
    assert command(*RL, *small, *dropped, "run_name=rest", f"resume_from_checkpoint={first}").code == 0
    assert computed(RUNS / "rest") == computed(RUNS / "whole")[3:]
    other = command(
        *RL,
        *small,
        *dropped,
        f"{LORA}.rank=4",
        "run_name=other",
        f"resume_from_checkpoint={first}",
        "resume_with_changes=true",
    )
    assert other.code == 1 and f"the adapter has rank 8, but {LORA}.rank is 4" in other.err

    monkeypatch.setattr(sys, "argv", ["export", str(RUNS / "whole"), "alone", "--adapter"])
    assert roll_gspo.export.main() == 0
    trained = RUNS / "whole/checkpoints/step_000004/actor_train_hf/adapter"
    assert {path.name for path in Path("alone").iterdir()} == {path.name for path in trained.iterdir()}
    alone, own = (load_file(folder / "adapter_model.safetensors") for folder in (Path("alone"), trained))
    assert alone.keys() == own.keys() and all(tensor.equal(own[name]) for name, tensor in alone.items())
    monkeypatch.setattr(sys, "argv", ["export", str(RUNS / "whole"), "merged"])
    assert roll_gspo.export.main() == 0 and (Path("merged") / "model.safetensors").is_file()


def test_supervised_fine_tuning_of_an_adapter(command: Command) -> None:
    sft = ("--config-name", "example_sft", "strategy=hf", RANK, "output_dir=out", "tracker=none", "run_name=sft")
    sizes = ("actor_train.data_args.num_rows=96", "validation.data_args.num_rows=8", "max_steps=12", "eval_steps=12")
    outcome = command(*sft, *sizes, "save_steps=12", "actor_train.training_args.learning_rate=1e-2")
    assert outcome.code == 0, outcome.out + outcome.err
    found = metrics_of(SFT_RUNS / "sft")
    assert found[12]["sft/loss"] < 0.9 * found[1]["sft/loss"]
    exported = SFT_RUNS / "sft/checkpoints/step_000012/actor_train_hf"
    assert (exported / "adapter/adapter_config.json").is_file() and (exported / "model.safetensors").is_file()
