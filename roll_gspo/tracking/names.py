"""Every metric by name, with what it means; `docs/metrics.md` is generated from this table.

`python -m roll_gspo.tracking.names` prints the page.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from roll_gspo.tracking.credit_names import CREDIT_METRICS
from roll_gspo.tracking.episode_names import EPISODE_METRICS, EPISODE_PATTERNS
from roll_gspo.tracking.memory_names import MEMORY_METRICS
from roll_gspo.tracking.mismatch_names import MISMATCH_METRICS, NOISE_METRICS
from roll_gspo.tracking.staleness_names import STALENESS_METRICS, STALENESS_PATTERNS


class MetricInfo(NamedTuple):
    """Description of a metric.

    Attributes:
        meaning: one sentence.
        unit: of the figure.
        reduction: over what it is a mean, maximum, ... within one step.
    """

    meaning: str
    unit: str
    reduction: str


_TOKENS = "mean over response tokens"
_SEQUENCES = "mean over sequences"
_UPDATES = "mean over optimizer steps"
_SAMPLES = "mean over samples"
_PROMPTS = "mean over validation prompts"
_STEP = "value of the step"
_SUM = "sum over the step"

METRICS: dict[str, MetricInfo] = {
    name: MetricInfo(*info)
    for name, info in {
        "actor/pg_loss": ("Policy-gradient loss, clipped and aggregated.", "loss", _UPDATES),
        "actor/kl_loss": ("KL loss to the reference before its coefficient.", "loss", _UPDATES),
        "actor/total_loss": ("What the optimizer minimises.", "loss", _UPDATES),
        "actor/clip_fraction": (
            "Tokens whose gradient the clip took away; with `importance_sampling: seq` all tokens of a "
            "clipped sequence. The figure that the GSPO paper plots.",
            "fraction",
            _TOKENS,
        ),
        "actor/clip_fraction_sequence": (
            "Sequences whose gradient the clip took away; a sequence counts once.",
            "fraction",
            _SEQUENCES,
        ),
        "actor/clip_fraction_high": (
            "Tokens clipped at the upper bound (positive advantage, ratio too large).",
            "fraction",
            _TOKENS,
        ),
        "actor/clip_fraction_low": (
            "Tokens clipped at the lower bound (negative advantage, ratio too small).",
            "fraction",
            _TOKENS,
        ),
        **{
            f"actor/clip_fraction_length_q{number}": (
                f"`actor/clip_fraction` of the {which} quarter of the rollout's responses.",
                "fraction",
                "mean over their tokens",
            )
            for number, which in enumerate(("shortest", "second shortest", "second longest", "longest"), start=1)
        },
        "actor/off_policy_masked_fraction": (
            "Samples with negative advantage that `off_policy_mask_threshold` excludes from the policy loss.",
            "fraction",
            _SEQUENCES,
        ),
        "actor/dual_clip_fraction": ("Tokens whose loss the dual clip bounds.", "fraction", _TOKENS),
        "actor/ratio_mean": ("Importance ratio of current to old policy.", "ratio", _TOKENS),
        "actor/ratio_max": ("Largest importance ratio.", "ratio", "max over response tokens"),
        "actor/ratio_min": ("Smallest importance ratio.", "ratio", "min over response tokens"),
        "actor/ratio_deviation": (
            "Distance of the importance ratio from 1, |ratio - 1|.",
            "ratio",
            _TOKENS,
        ),
        **NOISE_METRICS,
        "actor/approx_kl": ("KL(old policy || current policy), k3 estimate.", "nats per token", _TOKENS),
        "actor/kl_ref": (
            "KL of the current policy to the frozen reference, estimated as `kl_loss_type` says.",
            "nats per token",
            _TOKENS,
        ),
        "actor/entropy": (
            "Entropy of the next-token distribution, as the old log-probs were recomputed (with an entropy bonus: "
            "during the updates).",
            "nats",
            _TOKENS,
        ),
        "actor/log_prob_mean": ("Log-probability of the sampled tokens.", "nats", _TOKENS),
        "actor/grad_norm": ("Global gradient norm before clipping.", "norm", _UPDATES),
        "actor/lr": ("Learning rate of the last optimizer step.", "1", _STEP),
        "actor/skipped_updates": (
            "Optimizer steps skipped: loss or gradient not finite, or a loss without a gradient.",
            "optimizer steps",
            _SUM,
        ),
        "actor/num_updates": ("Optimizer steps taken.", "optimizer steps", _SUM),
        "actor/masked_fraction": (
            "Samples that the loss does not see: `max_len_mask`, `difficulty_mask`, failed rewards.",
            "fraction",
            _SAMPLES,
        ),
        "actor/sample_weight_max": (
            "Largest weight of a sample: `length_loss_weight`, `difficulty_loss_weight`; their mean is 1.",
            "1",
            "max over samples",
        ),
        "correction/weight_mean": ("Weight of `train_infer_correction` on the loss.", "1", _TOKENS),
        "correction/bounded_fraction": (
            "Weights of `train_infer_correction` that were truncated or masked.",
            "fraction",
            _TOKENS,
        ),
        "correction/raw_weight_mean": ("Weight of `train_infer_correction` before its bounds.", "1", _TOKENS),
        "correction/raw_weight_max": ("Largest such weight.", "1", "max over response tokens"),
        "critic/loss": ("Value loss.", "loss", _UPDATES),
        "critic/value_mean": ("Value that the critic predicts during its updates.", "reward", _TOKENS),
        "critic/return_mean": ("Return that the critic learns to predict.", "reward", _TOKENS),
        "critic/explained_variance": (
            "1 - var(return - value) / var(return) before the update; 1 is a perfect critic, 0 as good as a constant.",
            "fraction",
            "value over response tokens",
        ),
        "critic/clip_fraction": ("Values whose loss `value_clip` bounds.", "fraction", _TOKENS),
        "critic/grad_norm": ("Global gradient norm of the critic before clipping.", "norm", _UPDATES),
        "critic/lr": ("Learning rate of the critic's last optimizer step.", "1", _STEP),
        "critic/num_updates": ("Optimizer steps of the critic.", "optimizer steps", _SUM),
        "critic/skipped_updates": ("Optimizer steps of the critic that were skipped.", "optimizer steps", _SUM),
        "sft/loss": (
            "Negative log-likelihood of the tokens to imitate.",
            "nats per token",
            "mean over tokens to imitate",
        ),
        "sft/num_tokens": ("Tokens that were imitated.", "tokens", _SUM),
        "sft/tokens_per_s": (
            "Tokens of all sequences, prompts included, a second of `time/update`.",
            "tokens/s",
            _STEP,
        ),
        **CREDIT_METRICS,
        **MISMATCH_METRICS,
        **STALENESS_METRICS,
        "routing/rollout_mismatch": (
            "Activated experts of the trainer that the generation engine did not choose for the same token, same "
            "weights.",
            "fraction",
            "mean over experts of tokens that predict a response token",
        ),
        "routing/update_shift": (
            "Activated experts that the routers would choose during the updates and did not choose before: for the old "
            "log-probs; with R3, or where those are not recomputed, in the generation engine.",
            "fraction",
            "mean over experts of tokens that predict a response token",
        ),
        "routing/replayed_fraction": (
            "Tokens whose experts were replayed in the updates.",
            "fraction",
            "mean over layers of tokens that predict a response token",
        ),
        "reward/score_mean": (
            "Score of the samples trained on, with the overlong penalty, before normalisation.",
            "score",
            _SAMPLES,
        ),
        "reward/score_std": ("Spread of the scores.", "score", "standard deviation over samples"),
        "reward/score_min": ("Lowest score.", "score", "min over samples"),
        "reward/score_max": ("Highest score.", "score", "max over samples"),
        "reward/mean": (
            "Reward: the score after `reward_norm` and, unless the estimator compares samples, `reward_clip`.",
            "reward",
            _SAMPLES,
        ),
        "reward/kl": (
            "KL of the old policy to the reference, by `kl_penalty`; what an adaptive `kl/coef` follows.",
            "nats per token",
            _TOKENS,
        ),
        "reward/failed": (
            "Samples whose reward could not be computed, among all generated; nothing else counts them.",
            "samples",
            _SUM,
        ),
        "reward/seconds": ("Time that reward processes worked, summed over them.", "s", _SUM),
        "reward/hidden_share": (
            "Part of `reward/seconds` that lay before the end of generation, and so cost no time.",
            "fraction",
            "over the seconds that processes worked, summed",
        ),
        "reward/overlong_penalty": (
            "What `overlong_buffer_length` added to the scores (0 or less).",
            "score",
            _SAMPLES,
        ),
        "reward/clip_fraction": ("Normalised rewards cut by `reward_clip`.", "fraction", _SAMPLES),
        "reward/groups_without_spread": (
            "Groups whose scores are all equal, so that they teach nothing.",
            "fraction",
            "mean over groups",
        ),
        "advantage/mean": ("Advantage.", "advantage", _TOKENS),
        "advantage/std": (
            "Spread of the advantages.",
            "advantage",
            "standard deviation over response tokens",
        ),
        "advantage/min": ("Lowest advantage.", "advantage", "min over response tokens"),
        "advantage/max": ("Highest advantage.", "advantage", "max over response tokens"),
        "advantage/clip_fraction": ("Advantages cut by `advantage_clip`.", "fraction", _TOKENS),
        "kl/coef": ("Coefficient of the token-level KL penalty in the reward.", "1", _STEP),
        "rollout/response_length_mean": ("Length of the responses.", "tokens", _SAMPLES),
        "rollout/response_length_max": ("Longest response.", "tokens", "max over samples"),
        "rollout/response_length_min": ("Shortest response.", "tokens", "min over samples"),
        "rollout/prompt_length_mean": ("Length of the prompts.", "tokens", _SAMPLES),
        "rollout/truncated_fraction": (
            "Responses that ended at the length limit, without an end of sequence.",
            "fraction",
            _SAMPLES,
        ),
        "rollout/num_tokens": ("Response tokens generated, those of dropped groups included.", "tokens", _SUM),
        "rollout/score_mean": (
            "Score of every sample generated in the step, before dynamic sampling drops groups: the figure to compare "
            "algorithms by.",
            "score",
            _SAMPLES,
        ),
        "rollout/tokens_per_s": (
            "Response tokens per second of `time/generate`, or of `time/step` if generation runs ahead.",
            "tokens/s",
            _STEP,
        ),
        "rollout/continued": ("Responses that weights of several versions sampled.", "samples", _SUM),
        "rollout/restarted": ("Begun responses that were started again with new weights.", "samples", _SUM),
        "rollout/dropped": ("Begun responses that were dropped because the weights changed.", "samples", _SUM),
        "rollout/weights_version": ("Newest version of the weights that sampled the rollout.", "version", _STEP),
        "sampling/prompts": ("Prompts used up for the batch.", "prompts", _SUM),
        "sampling/groups_dropped": ("Groups that `query_filter_config` rejected.", "groups", _SUM),
        "sampling/groups_filled": (
            "Rejected groups that filled the batch after all prompts that `max_sampling_rounds` allows.",
            "groups",
            _SUM,
        ),
        "sampling/tokens_dropped": ("Response tokens of groups that nothing was trained on.", "tokens", _SUM),
        **EPISODE_METRICS,
        "data/epoch": ("Passes over the training data so far.", "epochs", _STEP),
        "data/prompts_dropped": (
            "Prompts left out, e.g. because they are longer than `prompt_length`.",
            "prompts",
            _SUM,
        ),
        "data/sequences_dropped": (
            "Sequences of `pipeline: sft` left out because they are longer than `sequence_length`.",
            "sequences",
            _SUM,
        ),
        "validation/score_mean": ("Score on the validation set.", "score", "mean over validation samples"),
        "validation/num_samples": ("Validation samples scored.", "samples", _SUM),
        "validation/failed": (
            "Validation samples whose reward could not be computed; no figure counts them.",
            "samples",
            _SUM,
        ),
        "validation/response_length_mean": (
            "Length of the validation responses.",
            "tokens",
            "mean over validation samples",
        ),
        "validation/truncated_fraction": (
            "Validation responses that ended at the length limit, without an end of sequence.",
            "fraction",
            "mean over validation samples",
        ),
        "validation/loss": (
            "With `pipeline: sft`: negative log-likelihood of the held-out tokens.",
            "nats per token",
            "mean over tokens to imitate",
        ),
        "validation/perplexity": ("exp of `validation/loss`.", "1", "value of the validation set"),
        "validation/num_tokens": ("Held-out tokens scored.", "tokens", _SUM),
        "time/step": ("Whole step; the sum of the stages below.", "s", _SUM),
        "time/generate": ("Sampling the responses.", "s", _SUM),
        "time/wait_rollouts": ("Waiting for samples that are generated meanwhile.", "s", _SUM),
        "time/score": ("Waiting for reward workers after the last response was generated.", "s", _SUM),
        "time/reference_log_probs": ("Forward passes of the reference.", "s", _SUM),
        "time/old_log_probs": ("Forward passes for the old log-probabilities.", "s", _SUM),
        "time/advantages": ("Rewards to advantages.", "s", _SUM),
        "time/values": ("Forward passes of the critic.", "s", _SUM),
        "time/update_critic": ("Optimizer steps of the critic.", "s", _SUM),
        "time/update": ("Optimizer steps: forward, backward, update.", "s", _SUM),
        "time/sync_weights": ("Moving the new weights into the generation engine.", "s", _SUM),
        "time/trace": ("Scoring `trace_groups` again after the update.", "s", _SUM),
        "time/validate": ("Validation.", "s", _SUM),
        "time/log": ("Writing metrics, rollouts and the report.", "s", _SUM),
        "time/save": ("Writing checkpoints.", "s", _SUM),
        "time/other": ("Everything outside of the stages.", "s", _SUM),
        "memory/rss_mb": ("Resident memory of the controlling process.", "MiB", _STEP),
        **MEMORY_METRICS,
    }.items()
}

# Names with a part that the run or the data decide, in angle brackets: the domains where `rewards` has several (of all
# samples generated, before dynamic sampling drops groups), the components of which a reward makes its score, and in
# validation the group: a value of `validation.group_by`, or `all`. Lags of stale samples are 0, 1, 2, 3_4 and 5_up.
METRIC_PATTERNS: dict[str, MetricInfo] = {
    name: MetricInfo(*info)
    for name, info in {
        "domain/<domain>/score_mean": ("Score, as the reward gave it.", "score", _SAMPLES),
        "domain/<domain>/failed": ("Samples whose reward could not be computed.", "samples", _SUM),
        "domain/<domain>/num_samples": ("Samples generated.", "samples", _SUM),
        "domain/<domain>/response_length_mean": ("Length of the responses.", "tokens", _SAMPLES),
        "domain/<domain>/groups_dropped": ("Groups that its `query_filter_config` rejected.", "groups", _SUM),
        "domain/<domain>/epoch": ("Passes over the domain's data so far.", "epochs", _STEP),
        "reward/component/<component>": (
            "A part of the score, over all samples generated whose reward told it.",
            "score",
            _SAMPLES,
        ),
        "validation/<group>/avg@<n>": ("Score, n samples per prompt.", "score", _PROMPTS),
        "validation/<group>/avg@<n>_low": ("Lower end of its 95 % confidence interval.", "score", _PROMPTS),
        "validation/<group>/avg@<n>_high": ("Upper end of its 95 % confidence interval.", "score", _PROMPTS),
        "validation/<group>/pass@<k>": ("Chance that one of k samples is correct.", "fraction", _PROMPTS),
        "validation/<group>/maj@<k>": ("Score of the answer that most of k samples give.", "score", _PROMPTS),
        **EPISODE_PATTERNS,
        **STALENESS_PATTERNS,
    }.items()
}


def metric_info(name: str) -> MetricInfo | None:
    """Return the description of a metric, including names that depend on the data; None if unknown."""
    if name in METRICS:
        return METRICS[name]
    for pattern, info in METRIC_PATTERNS.items():
        parts = re.split(r"<(\w+)>", pattern)
        values = {"n": r"\d+", "k": r"\d+", "lag": "0|1|2|3_4|5_up"}
        regex = "".join(f"({values.get(part, '.+')})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        if re.fullmatch(regex, name):
            return info
    return None


_HEAD = """# Metrics

Every step writes one line of `metrics.jsonl` with these names, those that apply to the run. A figure that
is not finite is `null` there. What is called a mean over tokens or sequences never counts padding. What
happens after a step is logged (its checkpoint, its report) is timed in the next line, so that the
`time/step` of all lines add up to the time of the run.

Generated from `roll_gspo/tracking/names.py`: `python -m roll_gspo.tracking.names > docs/metrics.md`."""


def metrics_page() -> str:
    """`docs/metrics.md` as Markdown."""
    lines = [_HEAD]
    family = ""
    families = list(dict.fromkeys(name.partition("/")[0] for name in METRICS))
    for name, info in sorted(METRICS.items(), key=lambda item: families.index(item[0].partition("/")[0])):
        if name.partition("/")[0] != family:
            family = name.partition("/")[0]
            lines += ["", f"## {family}", "", "| name | meaning | unit | reduction |", "|---|---|---|---|"]
        lines.append(f"| `{name}` | {info.meaning.replace('|', chr(92) + '|')} | {info.unit} | {info.reduction} |")
    lines += [
        "",
        "## By domain, component, group and lag",
        "",
        "| name | meaning | unit | reduction |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {info.meaning.replace('|', chr(92) + '|')} | {info.unit} | {info.reduction} |"
        for name, info in METRIC_PATTERNS.items()
    ]
    lines += ["", "`<lag>` is 0, 1, 2, 3_4 (3 and 4) or 5_up (5 and more)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_page(), end="")
