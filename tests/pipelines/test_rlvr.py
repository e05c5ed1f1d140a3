"""The training loop with every switch, on plain transformers in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import REWARD, REWARD_MODULE, SIZES, Outcome, computed, metrics_of, rollouts_of
from forked_command import train

from roll_gspo.tracking.names import metric_info

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUN = Path("out/example_gspo/run")
TWO_STEPS = ("max_steps=2", "run_name=run")


def _train(command: Command, *arguments: str) -> Outcome:
    outcome = command(*arguments, *TWO_STEPS)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    return outcome


SWITCHES = {
    "token level, GRPO advantages": (
        ("importance_sampling=token", "adv_estimator=grpo", "loss_agg_mode=token-mean"),
        (),
    ),
    "GSPO-token": (("importance_sampling=seq_token",), ()),
    "two epochs": (("ppo_epochs=2",), ()),
    "entropy bonus": (("entropy_loss_coef=0.01",), ("actor/entropy",)),
    "running reward norm": (("reward_norm=running",), ()),
    "adaptive token-level KL": (
        ("use_kl_loss=false", "kl_loss_coef=0", "add_token_level_kl=true", "init_kl_coef=0.1", "target_kl=0.1"),
        ("kl/coef", "reward/kl"),
    ),
    "a ratio per segment": (("importance_sampling=segment",), ()),
    "sample weights by length": (("length_loss_weight=true",), ("actor/sample_weight_max",)),
    "overlong penalty": (("overlong_buffer_length=31", "overlong_penalty_factor=2"), ("reward/overlong_penalty",)),
    "cut-off samples masked": (("max_len_mask=true",), ()),
    "correction of the engines' mismatch": (
        ("train_infer_correction=token_truncate", "train_infer_correction.upper_bound=1.0"),
        ("correction/weight_mean", "correction/bounded_fraction"),
    ),
    "DPPO on several rewards, with masks": (
        (
            *("policy_loss=dppo", "importance_sampling=token", "adv_estimator=gdpo"),
            *("off_policy_mask=opsm", "token_mask=top_entropy"),
            "rewards.column_addition={worker_cls: null, combine: weighted_sum, parts: "
            f"{{digits: {{worker_cls: {REWARD}, weight: 0.5}}, half: {{worker_cls: my_reward.half}}}}}}",
        ),
        ("actor/off_policy_masked_fraction", "actor/clip_fraction_length_q1", "actor/clip_fraction_length_q4"),
    ),
    "PPO": (("algorithm=ppo",), ("critic/loss", "critic/explained_variance", "time/values", "time/update_critic")),
    **{
        preset: ((f"algorithm={preset}",), ())
        for preset in ("cispo", "gmpo", "sapo", "topr", "luspo", "rloo", "reinforce_plus_plus", "raft_plus_plus")
    },
}


# The gradient equals that of the default. GSPO and GSPO-token have the same gradient if a sequence has one advantage.
# Whitening cancels an affine reward norm. A single turn is one segment. Engines that agree need no correction.
EQUAL_TO_DEFAULT = ("GSPO-token", "running reward norm", "a ratio per segment", "correction of the engines' mismatch")


@pytest.fixture(scope="session")
def default_rows(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run without any switch, which every switch is compared with."""
    folder = tmp_path_factory.mktemp("default")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    model = (f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out")
    outcome = train(*HF, *SIZES, *model, *TWO_STEPS, folder=folder)
    assert outcome.code == 0, outcome.err
    return metrics_of(folder / RUN)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_trains(
    command: Command, small: tuple[str, ...], default_rows: list[dict[str, Any]], switch: str
) -> None:
    arguments, adds = SWITCHES[switch]
    _train(command, *HF, *small, *arguments)
    rows = metrics_of(RUN)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert set(adds) <= set(row) and all(metric_info(name) for name in row if name != "step")
        assert None not in row.values(), "everything is finite"
        assert row["actor/num_updates"] == (8 if switch == "two epochs" else 4)
        assert row["actor/grad_norm"] > 0
    if "kl/coef" in adds:
        assert rows[1]["kl/coef"] == 0.1 != rows[2]["kl/coef"], "the coefficient adapts"
    # The gradient norm of step 2 depends on the update of step 1.
    default = pytest.approx(default_rows[2]["actor/grad_norm"], rel=1e-3)
    assert (rows[2]["actor/grad_norm"] == default) == (switch in EQUAL_TO_DEFAULT)


def test_grpo_example_trains(command: Command, small: tuple[str, ...]) -> None:
    _train(command, "--config-name", "example_grpo", "strategy=hf", *small)
    rows = metrics_of(Path("out/example_grpo/run"))
    assert all(row["actor/num_updates"] == 4 for row in rows[1:])
    # 64 samples of a group-normalised reward: whatever the group, it has mean 0
    assert abs(rows[1]["advantage/mean"]) < 0.1 and rows[1]["advantage/std"] > 0.3


def test_without_kl_term_no_reference_is_built(command: Command, small: tuple[str, ...]) -> None:
    outcome = _train(command, *HF, *small, "use_kl_loss=false", "kl_loss_coef=0")
    assert "start reference" not in outcome.out
    for row in metrics_of(RUN)[1:]:
        assert {"actor/kl_loss", "actor/kl_ref", "time/reference_log_probs"}.isdisjoint(row)


def test_without_recomputed_old_log_probs_the_engines_own_are_used(command: Command, small: tuple[str, ...]) -> None:
    outcome = _train(command, *HF, *small, "enable_old_logprobs_recompute=false")
    assert "weight transfer checked" in outcome.out
    first, second = metrics_of(RUN)[1:]
    for row in (first, second):
        assert 0 < row["mismatch/log_prob_diff_mean"] < 1e-4, "measured in the first mini-batch of the update"
    assert second["time/old_log_probs"] < 0.01, "the trainer scores the first rollout only, for the check"


def test_greedy_validation_is_the_same_each_time(command: Command, small: tuple[str, ...]) -> None:
    greedy = "validation.generating_args={temperature: 0}"
    # a learning rate of nearly nothing: the policy stays, and so does a greedy answer
    still = "actor_train.training_args.learning_rate=1e-30"
    _train(command, *HF, *small, greedy, still, "eval_steps=1")
    scores = [row["validation/score_mean"] for row in metrics_of(RUN)]
    assert len(scores) == 3 and len(set(scores)) == 1 and scores[0] > 0


def test_rollouts_and_metrics_tell_the_same_story(command: Command, small: tuple[str, ...]) -> None:
    _train(command, *HF, *small)
    row = metrics_of(RUN)[2]
    samples = rollouts_of(RUN)[2]
    assert len(samples) == 32 and len({s["group"] for s in samples}) == 8
    lengths = [len(s["response_token_ids"]) for s in samples]
    assert row["reward/score_mean"] == pytest.approx(sum(s["score"] for s in samples) / 32, rel=1e-6)
    assert row["rollout/num_tokens"] == sum(lengths)
    assert row["rollout/score_mean"] == pytest.approx(row["reward/score_mean"], rel=1e-6)
    assert row["rollout/truncated_fraction"] == sum(s["finish_reason"] == "length" for s in samples) / 32
    weighted = sum(s["advantage"] * n for s, n in zip(samples, lengths, strict=True)) / sum(lengths)
    assert abs(weighted) < 0.2, "whitened advantages, clipped"
    assert all(s["weights_version"] == 1 and s["ground_truth"].isdigit() for s in samples)
    assert all(s["response"].startswith("<|") is False for s in samples)


def test_config_of_a_run_runs_again_and_gives_the_same(command: Command, small: tuple[str, ...]) -> None:
    _train(command, *HF, *small)
    again = command("--config-dir", str(RUN), "--config-name", "config", "run_name=again")
    assert again.code == 0, again.err
    assert computed(RUN.with_name("again")) == computed(RUN)


def test_real_reward_and_short_warm_start_keep_running(command: Command, small: tuple[str, ...]) -> None:
    """Six steps of the shipped reward, of which most samples of such a beginner get nothing."""
    arguments = [a for a in small if not a.startswith("rewards.")]
    outcome = command(*HF, *arguments, "max_steps=6", "run_name=run", "tracker=none", "logging_steps=3")
    assert outcome.code == 0, outcome.err
    rows = metrics_of(RUN)[1:]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["actor/num_updates"], row["actor/skipped_updates"]) for row in rows] == [(4, 0)] * 6, "the KL trains"
    assert not (RUN / "tensorboard").exists()
    assert "step 3/6" in outcome.out and "step 6/6" in outcome.out and "step 2/6  " not in outcome.out


def test_loss_without_a_gradient_skips_the_update_and_says_so(command: Command, small: tuple[str, ...]) -> None:
    outcome = _train(command, *HF, *small, "rewards.column_addition={worker_cls: my_reward.half}", "kl=none")
    reason = "every advantage is 0 (every reward is 0.5) and there is no KL or entropy term; the update is skipped"
    assert reason in outcome.out
    rows = metrics_of(RUN)[1:]
    assert [(r["actor/num_updates"], r["actor/skipped_updates"], r["reward/failed"]) for r in rows] == [(0, 4, 0)] * 2
    assert rows[1]["rollout/weights_version"] == 0, "the engine keeps the weights that nothing has changed"


def test_groups_without_spread_are_replaced_and_their_tokens_are_counted(
    command: Command, small: tuple[str, ...]
) -> None:
    """A reward that one sample in eight gets: more than half of the groups of four have no spread."""
    coarse = "rewards.column_addition.worker_cls=my_reward.coarse"
    _train(command, *HF, *small, coarse, "query_filter=std_filter", "max_sampling_rounds=3")
    for row in metrics_of(RUN)[1:]:
        samples = rollouts_of(RUN)[row["step"]]
        assert len(samples) == 32, "the batch is full"
        spread = [len({s["score"] for s in samples if s["group"] == g}) > 1 for g in range(8)]
        assert spread.count(False) == row["sampling/groups_filled"]
        assert spread == sorted(spread, reverse=True), "what fills the batch comes last"
        dropped = row["sampling/groups_dropped"]
        assert dropped > 0 and row["sampling/prompts"] == 8 - row["sampling/groups_filled"] + dropped
        assert row["sampling/prompts"] == 24 or row["sampling/groups_filled"] == 0
        used = sum(len(s["response_token_ids"]) for s in samples)
        assert row["rollout/num_tokens"] == used + row["sampling/tokens_dropped"]
        if row["sampling/tokens_dropped"]:
            assert row["rollout/score_mean"] != row["reward/score_mean"], "the honest figure counts every sample"


def test_every_sample_masked_skips_the_update_and_says_so(command: Command, small: tuple[str, ...]) -> None:
    outcome = _train(command, *HF, *small, "max_len_mask=true", "response_length=2")
    assert (
        "every sample is masked (max_len_mask, difficulty_mask, failed rewards); the update is skipped" in outcome.out
    )
    assert [r["actor/num_updates"] for r in metrics_of(RUN)[1:]] == [0, 0]
    assert [r["actor/masked_fraction"] for r in metrics_of(RUN)[1:]] == [1, 1]


def test_rows_without_difficulty_are_refused_where_it_weighs(command: Command, small: tuple[str, ...]) -> None:
    outcome = command(*HF, *small, "difficulty_loss_weight=true")
    assert outcome.code == 2
    assert "difficulty_loss_weight: the row '" in outcome.err and "give every row a number from 0 to 1" in outcome.err
