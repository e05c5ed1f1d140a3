"""Recording and replay of the experts that the routers of one GPTModel choose (routing replay).

megatron-core asks an object on each router for the experts of a pass (its `moe_enable_routing_replay`). Its own object
is registered in a process-wide list that actor, reference and critic would share. During replay it also hides the
router's own choice. The objects here belong to one model.

Legend: B samples, S positions, L layers with a router, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from roll_gspo.errors import ConfigError, TrainingError


class LayerRoutes:
    """Experts that one router chose in its last pass, and those to replay in the next one.

    Attributes:
        chosen: [S * B, K] choice of the router, also if it replays another one; None before a pass.
        wanted: [S * B, K] experts to replay, -1 for a free choice; None if all choices are free.
        num_replayed: number of replayed choices in the last pass (a scalar on the device).
    """

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        self.wanted: Tensor | None = None
        self.num_replayed = torch.zeros((), dtype=torch.int64)
        self._asked = False

    def prescribe(self, wanted: Tensor | None) -> None:
        """Set `wanted` for the next passes."""
        self.wanted, self._asked = wanted, False
        self.num_replayed = torch.zeros((), dtype=torch.int64)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (scores, experts), both [S * B, K], of `scores` [S * B, E]; megatron's interface.

        A pass that is recomputed in the backward pass gets the same answer.
        """
        assert default_compute_topk is not None  # megatron always passes its own rule
        values, experts = default_compute_topk(scores, topk, num_groups, group_topk)
        self.chosen = experts.detach()
        if self.wanted is None:
            return values, experts
        if self.wanted.shape != experts.shape:
            raise TrainingError(
                f"router replay: {tuple(self.wanted.shape)} choices were recorded, the pass has {tuple(experts.shape)}"
            )
        self._asked = True
        experts = torch.where(self.wanted >= 0, self.wanted, experts)
        return scores.gather(1, experts), experts

    def count(self, _router: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        """Count the replayed choices in the router's output (probabilities, routing map), both [S * B, E].

        The output determines the dispatch of tokens. A router that did not ask counts as 0, even if its choice is the
        same.
        """
        if self.wanted is None or not self._asked:
            return
        self._asked = False
        self.num_replayed = (output[1].gather(1, self.wanted.clamp(min=0)) & (self.wanted >= 0)).sum()


class Routers:
    """The routers of a model, in the order of its layers.

    Raises:
        ConfigError: the model has none.
    """

    def __init__(self, gpt: GPTModel) -> None:
        self._layers: list[LayerRoutes] = []
        for module in gpt.modules():
            if isinstance(module, TopKRouter):
                routes: Any = LayerRoutes()  # megatron's annotation names its own class
                module.router_replay = routes
                module.register_forward_hook(routes.count)
                self._layers.append(routes)
        if not self._layers:
            raise ConfigError(
                "actor_train.router_replay: the model has no routers, it is not a mixture of experts; set mode: "
                "disable and record: false"
            )
        self._num_experts = gpt.config.num_moe_experts or 0

    def prescribe(self, experts: Tensor | None) -> None:
        """Set the experts of the next passes, [B, S, L, K]; -1 for all K of a token, or None, lets the router choose.

        Raises:
            TrainingError: the record is of another number of layers, or a row names no K different experts.
        """
        for layer in self._layers:
            layer.prescribe(None)
        if experts is None:
            return
        if experts.shape[2] != len(self._layers):
            raise TrainingError(
                f"router replay: experts of {experts.shape[2]} layers were recorded, the model has {len(self._layers)} "
                "routers"
            )
        _check_rows(experts, self._num_experts)
        for number, layer in enumerate(self._layers):
            # megatron flattens [S, B]
            layer.prescribe(experts[:, :, number].transpose(0, 1).flatten(0, 1).long())

    def check_replayed(self, experts: Tensor) -> int:
        """Check that the last pass used every prescribed expert in every layer; return their number.

        Raises:
            TrainingError: a layer chose freely. Nothing else would reveal that.
        """
        # a router that did not ask still has its number on the CPU
        replayed = torch.stack([layer.num_replayed.to(experts.device) for layer in self._layers])
        counts = torch.stack([(experts >= 0).sum(dim=(0, 1, 3)), replayed]).tolist()  # one wait for the device
        for number, (wanted, found) in enumerate(zip(*counts, strict=True)):
            if found != wanted:
                raise TrainingError(
                    f"router replay: layer {number} replayed {found} of {wanted} recorded choices; the installed "
                    "megatron-core does not use them"
                )
        return sum(counts[0])

    def chosen(self, batch_size: int, width: int) -> Tensor:
        """Return the experts that the routers chose in the last pass, [B, S, L, K] int16, padding included."""
        layers = [layer.chosen for layer in self._layers if layer.chosen is not None]
        if len(layers) != len(self._layers):
            raise TrainingError(
                "router replay: a router chose nothing; the installed megatron-core does not ask for it"
            )
        return torch.stack([layer.view(width, batch_size, -1).transpose(0, 1) for layer in layers], 2).to(torch.int16)


def _check_rows(experts: Tensor, num_experts: int) -> None:
    """Reject rows that would send a token to fewer than K experts or to an unknown one."""
    ordered = experts.sort(-1).values
    free = (experts == -1).all(-1)
    distinct = (ordered[..., 1:] > ordered[..., :-1]).all(-1)
    broken = ~(free | (distinct & (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)))
    if bool(broken.any()):
        sample, position, layer = broken.nonzero()[0].tolist()
        raise TrainingError(
            f"router replay: sample {sample}, position {position}, layer {layer} of the batch records the experts "
            f"{experts[sample, position, layer].tolist()}, which are not {experts.shape[-1]} different ones of "
            f"{num_experts}"
        )
