"""Every published method trains on Megatron and vLLM; and what only whole runs show of the new parts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from commands import REWARD, REWARD_MODULE, SIZES, checkpoints_of, computed, metrics_of, rollouts_of, spawn

from roll_gspo.run import shipped_folders
from roll_gspo.tracking.names import metric_info

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.slow]

OTHERS = {"example_sft", "example_multi_domain"}  # another pipeline, another task
EXAMPLES = sorted({file.stem for file in shipped_folders()[0].glob("example_*.yaml")} - OTHERS)
PPO = ("critic.training_args.per_device_train_batch_size=8", "critic.training_args.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    return folder


@pytest.fixture(scope="module")
def arguments(pretrained: Path) -> tuple[str, ...]:
    reward = f"rewards.column_addition.worker_cls={REWARD}"
    return (*SIZES, f"pretrain={pretrained}", reward, "output_dir=out")


def test_there_is_an_example_of_every_preset() -> None:
    presets = {file.stem for file in (shipped_folders()[1] / "algorithm").glob("*.yaml")}
    short = {"reinforce_plus_plus": "reinforce_pp", "raft_plus_plus": "raft_pp"}  # as ROLL names its examples
    assert {f"example_{short.get(name, name)}" for name in presets} == set(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_trains_three_steps(folder: Path, arguments: tuple[str, ...], example: str) -> None:
    critic = PPO if example == "example_ppo" else ()
    outcome = spawn("--config-name", example, *arguments, *critic, "max_steps=3", "run_name=run", folder=folder)
    assert outcome.code == 0, outcome.out[-3000:] + outcome.err
    rows = metrics_of(folder / "out" / example / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert all(metric_info(name) for name in set(row) - {"step"})
        assert None not in row.values(), "everything is finite"
        assert row["actor/num_updates"] == 4 and row["actor/grad_norm"] > 0
        assert row["mismatch/log_prob_diff_mean"] < 1e-4, "always measured"
    critic = [row for row in rows[1:] if "critic/loss" in row]
    assert len(critic) == (3 if example == "example_ppo" else 0)


def test_ppo_with_dynamic_sampling_goes_on_as_if_it_had_not_been_stopped(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    run = (
        *(
            "--config-name",
            "example_ppo",
            *arguments,
            *PPO,
            "exp_name=stopped",
            "reward_norm=running",
            "critic_warmup=1",
        ),
        *("query_filter=mean_filter", "query_filter_config.filter_args.threshold_down=0.55", "max_sampling_rounds=2"),
    )
    # sent while step 2 is scored: 16 samples of the validation and 32 or 64 of the first step came before
    stop = f"rewards.column_addition.worker_args={{at: [90], number: {signal.SIGTERM:d}}}"
    assert spawn(*run, "run_name=whole", folder=folder).code == 0
    outcome = spawn(*run, "run_name=cut", stop, folder=folder)
    assert outcome.code == 128 + signal.SIGTERM, outcome.out + outcome.err
    assert checkpoints_of(folder / "out/stopped/cut"), "saved what it had"
    assert spawn(*run, "run_name=cut", "resume_from_checkpoint=true", folder=folder).code == 0
    whole, cut = (folder / "out/stopped" / name for name in ("whole", "cut"))
    assert computed(cut) == computed(whole)
    assert rollouts_of(cut) == rollouts_of(whole)
    rows = metrics_of(whole)[1:]
    assert rows[0]["actor/num_updates"] == 0 and rows[0]["critic/num_updates"] == 4, "the critic warms up alone"
    assert rows[1]["actor/num_updates"] == 4
    assert any(row["sampling/groups_dropped"] > 0 for row in rows)
