"""Log-probs and entropies of response tokens under a sharded model.

Legend: B samples, T response positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.fsdp2.engine.model import ShardedModel
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput
from roll_gspo.strategies.log_probs import token_log_probs


def scores_of(logits: Tensor, given: ModelInput, temperature: float, entropy: bool) -> TokenScores:
    """Return scores [B, T] from logits [N, V]; differentiable."""
    log_probs, entropies = token_log_probs(logits, given.tokens, temperature, entropy)
    return TokenScores(given.place(log_probs), None if entropies is None else given.place(entropies))


def score(model: ShardedModel, sequences: Sequences, entropy: bool) -> TokenScores:
    """Score all samples without gradient; the result is float32 on the CPU of every rank."""

    def read(logits: Tensor, given: ModelInput) -> list[Tensor]:
        found = scores_of(logits, given, model.setup.temperature, entropy)
        return [found.log_probs] if found.entropy is None else [found.log_probs, found.entropy]

    figures = model.over_samples(sequences, read)
    return TokenScores(figures[0], figures[1] if entropy else None)
