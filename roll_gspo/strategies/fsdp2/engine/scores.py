"""Log-probs and entropies of response tokens under a sharded model.

Legend: B samples, T response positions, N response tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.fsdp2.engine.model import ShardedModel
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput
from roll_gspo.strategies.fused_scores import scores_from_hidden
from roll_gspo.strategies.log_probs import token_log_probs


def scores_of(model: ShardedModel, outputs: Tensor, given: ModelInput, entropy: bool) -> TokenScores:
    """Return scores [B, T] from the outputs of a pass: hidden states [N, H] or logits [N, V]; differentiable.

    Hidden states need the gathered output layer, so that this belongs to `ShardedModel.gathered`.
    """
    temperature = model.setup.temperature
    if model.head is None:
        log_probs, entropies = token_log_probs(outputs, given.tokens, temperature, entropy)
    else:
        weight: Any = model.head.weight
        log_probs, entropies = scores_from_hidden(
            outputs,
            weight,
            given.tokens,
            temperature=temperature,
            entropy=entropy,
            vocab_size=len(weight),
            fp32_lm_head=model.config.fp32_lm_head,
            fused_head=model.config.fused_head,
        )
    return TokenScores(given.place(log_probs), None if entropies is None else given.place(entropies))


def score(model: ShardedModel, sequences: Sequences, entropy: bool) -> TokenScores:
    """Score all samples without gradient; the result is float32 on the CPU of every rank."""

    def read(outputs: Tensor, given: ModelInput) -> list[Tensor]:
        found = scores_of(model, outputs, given, entropy)
        return [found.log_probs] if found.entropy is None else [found.log_probs, found.entropy]

    figures = model.over_samples(sequences, read)
    return TokenScores(figures[0], figures[1] if entropy else None)
