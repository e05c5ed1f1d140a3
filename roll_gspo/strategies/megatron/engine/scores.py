"""Log-probs and entropies of response tokens under a megatron-core model.

Legend: B samples, T response positions, S positions, N response tokens, L layers with a router, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.fused_scores import scores_from_hidden
from roll_gspo.strategies.megatron.engine.model import MicroBatch, ResponseModel
from roll_gspo.strategies.megatron.engine.packed_layout import PackedLayout
from roll_gspo.strategies.megatron.engine.parallel import tensor_group
from roll_gspo.strategies.megatron.engine.router_replay import Routers


def scores_of_rows(model: ResponseModel, rows: Tensor, packed_layout: PackedLayout, entropy: bool) -> TokenScores:
    """Return scores [B, T] from hidden states [N, H]; differentiable."""
    group, weight = tensor_group(), model.head_weight
    log_probs, entropies = scores_from_hidden(
        rows,
        weight,
        packed_layout.tokens,
        temperature=model.setup.temperature,
        entropy=entropy,
        vocab_size=model.architecture.vocab_size,
        group=group if group.size() > 1 else None,
        first_row=group.rank() * len(weight),
        fp32_lm_head=model.config.fp32_lm_head,
        fused_head=model.config.fused_head,
    )
    return TokenScores(packed_layout.place(log_probs), None if entropies is None else packed_layout.place(entropies))


def score(model: ResponseModel, sequences: Sequences, entropy: bool, routers: Routers | None = None) -> TokenScores:
    """Score all samples without gradient; the result is on the CPU.

    Args:
        model: the model.
        sequences: the samples.
        routers: routers of the model, if the chosen experts are requested, too.
        entropy: compute the entropies.
    """
    if routers is not None:
        routers.prescribe(None)

    def read(rows: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
        found = scores_of_rows(model, rows, micro_batch.packed_layout, entropy)
        figures = [found.log_probs] + ([] if found.entropy is None else [found.entropy])
        if routers is not None:
            # 0 is padding, as in any figure; gloo adds no 16-bit integers
            figures.append(chosen_experts(routers, micro_batch.sequences).int() + 1)
        return figures

    figures = model.over_samples(sequences, read)
    routes = (figures.pop() - 1).to(torch.int16) if routers is not None else None
    return TokenScores(figures[0], figures[1] if entropy else None, routes)


def chosen_experts(routers: Routers, sequences: Sequences) -> Tensor:
    """Return [B, S, L, K] int16, the experts of the last pass over `sequences`, -1 on padding."""
    chosen = routers.chosen(*sequences.input_ids.shape)
    return chosen.masked_fill(~sequences.attention_mask[:, :, None, None], -1)
