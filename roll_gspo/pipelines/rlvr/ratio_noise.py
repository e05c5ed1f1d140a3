"""Compare the noise of the importance ratio with its clip range: in the plan, and in warnings of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from roll_gspo.config.clip_range import MAX_NOISE_SHARE, nearest_log_bound
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.declarations import RATIOS
from roll_gspo.pipelines.repeats import is_due

logger = logging.getLogger(__name__)

# RMS difference of a token's log-prob between two passes whose roundings are independent: other weights by 1e-7 each, a
# random model of 4 layers, bf16, on a CPU (docs/reproducing-gspo.md). fp16 has 3 and fp32 16 more bits.
TOKEN_NOISE = {"bf16": 1.3e-2, "fp16": 1.3e-2 / 2**3, "fp32": 1.3e-2 / 2**16}
SOURCES = {
    "actor/ratio_noise": "two passes of the trainer over the same weights differ that much",
    "mismatch/ratio_rms": "trainer and generation engine differ that much at equal weights, which estimates the "
    "rounding in ratios once the weights have moved",
}


def clip_distance(config: ExperimentConfig) -> float | None:
    """Return the distance in log space between a ratio of 1 and its nearer clip bound; None without a clip range."""
    if config.clip_range is None:
        return None
    return nearest_log_bound(*config.clip_range, config.pg_clip_length_scaling or config.policy_loss == "fspo")


def noise_texts(config: ExperimentConfig) -> Iterator[str]:
    """Yield what noise of the ratio to expect for this dtype and response length, for the plan."""
    distance, dtype = clip_distance(config), config.actor_train.model_args.dtype
    if distance is None or dtype == "fp32":
        return
    noise, length = TOKEN_NOISE[dtype], config.max_response_length
    of_response = RATIOS.declaration(config.importance_sampling).scale == "sequence"
    what = "per token"
    if of_response and not config.pg_clip_length_scaling:
        noise, what = noise / math.sqrt(length), f"at {length} tokens per response"
    share = noise / distance
    yield (
        f"{dtype} moves ratios by about {noise:.1e} {what} (rounding, measured on a CPU), {_times(share)} the clip "
        f"range {distance:.1g}; actor/ratio_noise and mismatch/ratio_rms measure it"
    )
    if share > MAX_NOISE_SHARE:
        yield f"to lower it: {'; '.join(remedies(config))} (docs/reproducing-gspo.md)"


def _times(share: float) -> str:
    return f"{share:.2g} ×"


def remedies(config: ExperimentConfig) -> list[str]:
    """Return what lowers the noise of the ratio, or what makes it harmless, the most effective first."""
    found = []
    for role, block in (("actor_train", config.actor_train), ("actor_infer", config.actor_infer)):
        if engine_options(block.strategy_args).get("fp32_lm_head") is False:
            found.append(f"set {role}.strategy_args.strategy_config.fp32_lm_head: null, which keeps logits in float32")
    if config.clip_range is not None:
        found.append("raise the clip range (pg_clip_low, pg_clip_high) above three times the noise")
    if config.enable_old_logprobs_recompute:
        found.append("score and train one sample per pass (infer_batch_size, per_device_train_batch_size: 1)")
    if engine_options(config.actor_infer.strategy_args).get("batch_invariant") is False:
        found.append("set actor_infer.strategy_args.strategy_config.batch_invariant: true")
    if config.actor_train.model_args.dtype != "fp32":
        found.append("train in fp32 if the model is small")
    return found


def engine_options(args: Any) -> Mapping[str, Any]:
    """Return the block `strategy_config` of an engine as plain values; empty if it has none."""
    return args.model_dump().get("strategy_config") or {}


class RatioNoiseAlarm:
    """Warn if the noise of the ratio is above a third of the clip range.

    The warning repeats each time that the number of consecutive such steps doubles.

    Args:
        config: the whole configuration.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._distance = clip_distance(config)
        self._count = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Check the metrics of a step. Return `actor/clip_distance` if a noise was measured."""
        found = {name: metrics[name] for name in SOURCES if name in metrics}
        if self._distance is None or not found:
            return {}
        name = max(found, key=lambda name: found[name])
        share = found[name] / self._distance
        self._count = self._count + 1 if share > MAX_NOISE_SHARE else 0
        if self._count and is_due(self._count, 1):
            logger.warning(
                "step %d: %s %.2g is %s the clip range %.1g: %s; rounding then decides what is clipped; to lower it: "
                "%s",
                *(step, name, found[name], _times(share), self._distance, SOURCES[name]),
                "; ".join(remedies(self._config)),
            )
        return {"actor/clip_distance": self._distance}
