"""The gate that acts if the generation engine computes another policy than the trainer from the same weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import TrainingError
from roll_gspo.pipelines.rlvr.ratio_noise import engine_options
from roll_gspo.pipelines.rlvr.transfer_check import Mismatch

logger = logging.getLogger(__name__)


class MismatchGate:
    """Compare KL(generation engine || trainer) before the first update of a process with a maximum.

    Args:
        config: the whole configuration; `mismatch_gate` is null without a gate.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config

    def check(self, step: int, found: Mismatch) -> None:
        """Warn or stop if the KL is above the maximum, or is NaN.

        Raises:
            TrainingError: `action` is `stop`; the message lists likely causes.
        """
        gate = self._config.mismatch_gate
        if gate is None or found.kl <= gate.max_kl:
            return
        causes = "\n".join(f"  * {cause}" for cause in mismatch_causes(self._config))
        text = (
            f"step {step}: mismatch_gate.max_kl: at equal weights, KL(generation engine || trainer) is {found.kl:.3g} "
            f"nats per token (log-probs differ by {found.mean:.2g} on average, {found.largest:.2g} at most), above "
            f"{gate.max_kl:g}; likely causes, the most frequent first:\n{causes}\nor raise max_kl, or set "
            "mismatch_gate: null"
        )
        if gate.action == "stop":
            raise TrainingError(text)
        logger.warning("%s", text)


def mismatch_causes(config: ExperimentConfig) -> Iterator[str]:
    """Yield likely causes of another policy in the engine, each with its fix; those of this configuration first."""
    train, infer = config.actor_train.model_args.dtype, config.actor_infer.model_args.dtype
    if train != infer:
        yield f"actor_train computes in {train}, actor_infer in {infer}: set the same model_args.dtype"
    for role, block in (("actor_train", config.actor_train), ("actor_infer", config.actor_infer)):
        if engine_options(block.strategy_args).get("fp32_lm_head") is False:
            yield f"{role} rounds logits to 16 bits: set strategy_args.strategy_config.fp32_lm_head: null"
    if config.actor_train.router_replay.mode == "disable":
        yield "a mixture of experts routes tokens differently in both engines: set router_replay=R3"
    yield "the engine quantises weights or its KV cache (quantization, kv_cache_dtype): remove these options"
    yield "the engine's log-probs are not those of its sampling distribution (logits processors, another temperature)"
    yield "the engine's kernels (attention backend, torch.compile): try enforce_eager: true or another backend"
    yield "a tensor is stale in the engine: compare with weight_transfer.checksum: true"
