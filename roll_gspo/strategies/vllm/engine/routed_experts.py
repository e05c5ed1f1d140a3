"""Routed experts of every generated token of a mixture of experts in vLLM.

vLLM 0.32 can return them (`enable_return_routed_experts`), but only with its second model runner, which needs Triton
and therefore a GPU. That path is used on CUDA and is not yet run on a GPU. On a CPU, a capture callback on the router
of every layer records them, and the scheduler output assigns them to requests. Both are internal interfaces of vLLM
0.32. In both cases the result is checked for completeness.

Legend: P prompt tokens, R response tokens, N tokens of an engine step, L layers with a router, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm import LLM
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture


class ExpertSource(Protocol):
    """Provides the routed experts of finished responses."""

    def take(self, output: RequestOutput) -> Tensor:
        """Return and drop the experts of a finished request, [P + R - 1, L, K] int16 without the last token.

        Raises:
            RuntimeError: the experts of a token are missing.
        """
        ...

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop the records of aborted requests, named by vLLM's internal IDs."""
        ...


def recording_args(checkpoint: Path) -> dict[str, object]:
    """Return the engine arguments for recording experts.

    Raises:
        ConfigError: the model is dense.
    """
    if Architecture.from_checkpoint(checkpoint).experts is None:
        raise ConfigError(
            f"actor_train.router_replay: {checkpoint} has no routers, it is not a mixture of experts; set mode: "
            "disable and record: false"
        )
    if current_platform.is_cpu():
        # a token from the prefix cache passes no router
        return {"enable_prefix_caching": False}
    # vLLM stores the returned experts with the blocks of its prefix cache, so it requires one
    return {"enable_return_routed_experts": True, "enable_prefix_caching": True}


def expert_source(llm: LLM) -> ExpertSource:
    """Return the expert source of an engine built with `recording_args`."""
    return ExpertRecorder(llm) if current_platform.is_cpu() else ReturnedExperts()


class ReturnedExperts:
    """Experts that vLLM returns with each response."""

    def take(self, output: RequestOutput) -> Tensor:
        """Return the experts of a finished request, [P + R - 1, L, K] int16."""
        rows = output.outputs[0].routed_experts
        if rows is None or len(rows) != _num_predicting(output):
            count = 0 if rows is None else len(rows)
            raise RuntimeError(
                f"vllm: request {output.request_id} returned the experts of {count} tokens instead of "
                f"{_num_predicting(output)}"
            )
        return torch.from_numpy(rows.astype("int16"))

    def forget(self, request_ids: Sequence[str]) -> None:
        """Do nothing: no records are kept."""


class ExpertRecorder:
    """Records the experts of every token that an engine computes; prefix caching must be off.

    Args:
        llm: in-process engine of a mixture of experts.
    """

    def __init__(self, llm: LLM) -> None:
        (self._runner,) = llm.collective_rpc(_model_runner)
        layers = [module for module in self._runner.model.modules() if isinstance(module, MoERunner)]
        self._step_experts: dict[int, Tensor] = {}
        self._request_experts: dict[str, list[tuple[int, Tensor]]] = {}
        for layer in layers:
            layer.router.set_capture_fn(functools.partial(self._capture, layer.layer_id))
        self._num_layers = len(layers)
        self._execute_model = self._runner.execute_model
        self._runner.execute_model = self._execute_and_record

    def _capture(self, layer: int, experts: Tensor) -> None:
        """Store the experts [N, K] of one layer in the current engine step."""
        self._step_experts[layer] = experts.to("cpu", torch.int16)

    def _execute_and_record(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one engine step and record its experts; tokens are ordered by request in the batch."""
        self._step_experts.clear()
        result = self._execute_model(scheduled, *args, **kwargs)
        if scheduled.total_num_scheduled_tokens and len(self._step_experts) == self._num_layers:
            rows = torch.stack([self._step_experts[layer] for layer in sorted(self._step_experts)], 1)
            batch, offset = self._runner.input_batch, 0
            for index, request_id in enumerate(batch.req_ids):
                count = scheduled.num_scheduled_tokens[request_id]
                first = int(batch.num_computed_tokens_cpu[index])
                self._request_experts.setdefault(request_id, []).append((first, rows[offset : offset + count].clone()))
                offset += count
        return result

    def take(self, output: RequestOutput) -> Tensor:
        """Return and drop the experts of a finished request, [P + R - 1, L, K] int16."""
        # the engine appends eight hex digits to the request ID of the outputs
        names = [name for name in self._request_experts if name.rpartition("-")[0] == output.request_id]
        pieces = [piece for name in names for piece in self._request_experts.pop(name)]
        if not pieces:
            raise RuntimeError(f"vllm: no experts of request {output.request_id} were recorded")
        num_rows = _num_predicting(output)
        experts = pieces[0][1].new_full((num_rows, *pieces[0][1].shape[1:]), -1)
        for first, rows in pieces:  # tokens of a preempted request are recomputed; the last record counts
            kept = rows[: max(num_rows - first, 0)]
            experts[first : first + len(kept)] = kept
        if bool((experts < 0).any()):
            raise RuntimeError(f"vllm: the experts of some tokens of request {output.request_id} were not recorded")
        return experts

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop the records of aborted requests."""
        for request_id in request_ids:
            self._request_experts.pop(request_id, None)


def _num_predicting(output: RequestOutput) -> int:
    """Return P + R - 1."""
    return len(output.prompt_token_ids or ()) + len(output.outputs[0].token_ids) - 1


def _model_runner(worker: Any) -> Any:
    return worker.model_runner
