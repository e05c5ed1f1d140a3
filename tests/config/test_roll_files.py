"""Files with the keys of ROLL's examples load as they are; what differs is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composed import load_config
from config_problems import derived_config, problem_of, problems_of

from roll_gspo.config.base import parse_device_mapping
from roll_gspo.config.legacy import sift
from roll_gspo.config.load import known_keys
from roll_gspo.pipelines.plan import make_plan

FOLDER = Path(__file__).parent / "roll"
RECOMPUTE = "actor_train.strategy_args.strategy_config.recompute"
JUDGE = ("rewards.llm_judge.judge_prompt", "rewards.llm_judge.judge_model_type")
DIFFERENCES = {
    "grpo": JUDGE,
    "gspo": JUDGE,
    "ppo": tuple(
        f"critic.strategy_args.strategy_config.{key}"
        for key in ("fsdp_size", "param_dtype", "reduce_dtype", "offload_policy", "wrap_policy")
    ),
    "raft_pp": ("reward_norm", *JUDGE),
    "reinforce_pp": JUDGE,
    "rlvr_config": JUDGE,
    "topr": ("rl_loss_coef", "adv_estimator", *JUDGE),
    "total_rl_options": JUDGE,
}


def differing_keys(warnings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the warnings `differs from ROLL: file:line: key: message`."""
    return tuple(text.split(": ")[2] for text in warnings if text.startswith("differs from ROLL: "))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_example_loads_and_the_plan_has_what_differs(name: str) -> None:
    loaded = load_config(name, config_dir=FOLDER)
    assert differing_keys(loaded.warnings) == DIFFERENCES[name]
    assert make_plan(loaded.config, loaded.warnings).config_warnings == loaded.warnings
    megatron = loaded.config.actor_train.strategy_args.strategy_config
    assert (megatron.recompute_granularity, megatron.recompute_method, megatron.recompute_num_layers) == (
        *("full", "uniform"),
        1,
    )


def test_converted_values_have_the_meaning_of_rolls() -> None:
    gspo = load_config("gspo", config_dir=FOLDER).config
    assert gspo.rewards["llm_judge"].arguments == {"engine": {"model": "Qwen/Qwen3-0.6B", "devices": [12, 13, 14, 15]}}
    critic = load_config("ppo", config_dir=FOLDER).config.critic
    assert critic is not None and critic.strategy_args.strategy_name == "fsdp2_train"
    options = critic.strategy_args.strategy_config
    assert (options.grad_reduce_in_fp32, options.reshard_after_forward, options.cpu_offload) == (True, True, False)
    topr = load_config("topr", config_dir=FOLDER).config
    assert (topr.adv_estimator, topr.policy_loss) == ("reinforce", "clip")
    assert load_config("raft_pp", config_dir=FOLDER).config.reward_norm is None


def test_file_of_supervised_fine_tuning_names_the_pipeline() -> None:
    problems = {problem.key: problem for problem in problems_of("sft", config_dir=FOLDER)}
    assert sorted(problems) == ["prompt_key", "query_key", "response_key", "sft_train"]
    assert problems["sft_train"].names("pipeline", "sft", "actor_train")


def test_sglang_and_an_omitted_engine_configuration_are_converted(tmp_path: Path) -> None:
    text = """\
actor_infer: {strategy_args: {strategy_name: sglang, strategy_config: {mem_fraction_static: 0.7, load_format: auto}}}
reference: {strategy_args: {strategy_name: hf_infer, strategy_config: null}}
"""
    loaded = load_config("mine", config_dir=derived_config(tmp_path, text))
    engine = loaded.config.actor_infer.strategy_args
    assert (engine.strategy_name, engine.strategy_config.gpu_memory_utilization) == ("vllm", 0.7)
    assert differing_keys(loaded.warnings) == ("actor_infer.strategy_args.strategy_name",)


def test_none_is_text_in_names_and_arguments() -> None:
    config = load_config("example_gspo", "exp_name='None'", "reward_clip='None'").config
    assert (config.exp_name, config.reward_clip) == ("None", None)


def test_blocks_of_recomputed_layers_need_their_number() -> None:
    assert problem_of(f"{RECOMPUTE}_granularity=full", f"{RECOMPUTE}_method=block").key == f"{RECOMPUTE}_method"


def test_other_weights_of_the_policy_loss_are_refused() -> None:
    assert problem_of("rl_loss_coef=0.5").key == "rl_loss_coef"


def test_list_in_a_list_call_is_a_device_mapping() -> None:
    assert parse_device_mapping("list([0, 1, 4])") == (0, 1, 4)


def test_every_key_of_rolls_files_is_known() -> None:
    engines = dict.fromkeys(("actor_train", "critic"), "megatron_train")
    engines |= {"reference": "megatron_infer", "actor_infer": "vllm"}
    values: dict[str, Any] = {}
    for line in (FOLDER / "keys_2026.txt").read_text().splitlines():
        *parents, key = line.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node.setdefault(key, None)
    for role, engine in engines.items():
        values[role]["strategy_args"]["strategy_name"] = engine

    def unknown(node: dict[str, Any], path: tuple[str, ...]) -> list[str]:
        known = [] if path == ("rewards",) else known_keys(path, values)  # domains are named by the user
        wrong = [".".join((*path, key)) for key in node if known and key not in known]
        blocks = [(key, value) for key, value in node.items() if isinstance(value, dict)]
        return wrong + [name for key, value in blocks for name in unknown(value, (*path, key))]

    assert unknown(sift(values).values, ()) == []
