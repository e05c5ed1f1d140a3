"""The experts that each token of a mixture of experts went through while vLLM generated it.

vLLM 0.32 returns them itself (`enable_return_routed_experts`), but with its second model runner only, which needs
Triton and so a GPU; that way is taken on CUDA, and was written by reading, never run. On a CPU they are read where vLLM
offers them to its own recorder: a callback on the router of every layer, cut up by what the scheduler says a step
computed. These are inner interfaces of 0.32. Either way what is returned is checked for completeness.

Legend: P prompt tokens, R response tokens, N tokens of an engine step, L layers with a router, K experts a token.
"""

from __future__ import annotations

import functools
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
    """Where the experts of a response come from."""

    def take(self, output: RequestOutput) -> Tensor:
        """[P + R - 1, L, K] int16 of a finished request; nothing was predicted from the last token.

        Raises:
            RuntimeError: a token is missing.
        """
        ...

    def forget(self) -> None:
        """Drop what unfinished requests left."""
        ...


def recording_args(checkpoint: Path) -> dict[str, object]:
    """The engine arguments that recording the experts needs.

    Raises:
        ConfigError: the model is dense.
    """
    if Architecture.from_checkpoint(checkpoint).experts is None:
        raise ConfigError(
            f"actor_train.router_replay: {checkpoint} has no routers, it is not a mixture of experts; set mode: "
            "disable and record: false"
        )
    if current_platform.is_cpu():
        # a token that is taken from the cache passes no router
        return {"enable_prefix_caching": False}
    # vLLM keeps returned experts beside the blocks of its prefix cache and insists on having one
    return {"enable_return_routed_experts": True, "enable_prefix_caching": True}


def expert_source(llm: LLM) -> ExpertSource:
    """Of an engine that was built with `recording_args`."""
    return ExpertRecorder(llm) if current_platform.is_cpu() else ReturnedExperts()


class ReturnedExperts:
    """The experts that vLLM returns with a response."""

    def take(self, output: RequestOutput) -> Tensor:
        """See `ExpertSource`."""
        rows = output.outputs[0].routed_experts
        if rows is None or len(rows) != _num_predicting(output):
            count = 0 if rows is None else len(rows)
            raise RuntimeError(
                f"vllm: request {output.request_id} came with the experts of {count} tokens instead of "
                f"{_num_predicting(output)}"
            )
        return torch.from_numpy(rows.astype("int16"))

    def forget(self) -> None:
        """Nothing is kept."""


class ExpertRecorder:
    """Records the experts of every token that the engine computes from now on; prefix caching must be off.

    Args:
        llm: an engine of a mixture of experts, in this process.
    """

    def __init__(self, llm: LLM) -> None:
        (self._runner,) = llm.collective_rpc(_model_runner)
        layers = [module for module in self._runner.model.modules() if isinstance(module, MoERunner)]
        self._of_step: dict[int, Tensor] = {}
        self._of_request: dict[str, list[tuple[int, Tensor]]] = {}
        for layer in layers:
            layer.router.set_capture_fn(functools.partial(self._capture, layer.layer_id))
        self._num_layers = len(layers)
        self._execute_model = self._runner.execute_model
        self._runner.execute_model = self._execute_and_record

    def _capture(self, layer: int, experts: Tensor) -> None:
        """[N, K] of a layer."""
        self._of_step[layer] = experts.to("cpu", torch.int16)

    def _execute_and_record(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        """One step of the engine; its tokens lie in the order of the requests in the batch."""
        self._of_step.clear()
        result = self._execute_model(scheduled, *args, **kwargs)
        if scheduled.total_num_scheduled_tokens and len(self._of_step) == self._num_layers:
            rows = torch.stack([self._of_step[layer] for layer in sorted(self._of_step)], 1)
            batch, offset = self._runner.input_batch, 0
            for index, request_id in enumerate(batch.req_ids):
                count = scheduled.num_scheduled_tokens[request_id]
                first = int(batch.num_computed_tokens_cpu[index])
                self._of_request.setdefault(request_id, []).append((first, rows[offset : offset + count].clone()))
                offset += count
        return result

    def take(self, output: RequestOutput) -> Tensor:
        """See `ExpertSource`; they are forgotten here afterwards."""
        # the engine appends eight hex digits to the id that the outputs show
        names = [name for name in self._of_request if name.rpartition("-")[0] == output.request_id]
        pieces = [piece for name in names for piece in self._of_request.pop(name)]
        if not pieces:
            raise RuntimeError(f"vllm: no experts of request {output.request_id} were recorded")
        num_rows = _num_predicting(output)
        experts = pieces[0][1].new_full((num_rows, *pieces[0][1].shape[1:]), -1)
        for first, rows in pieces:  # tokens of a request that was preempted come again, the later ones count
            kept = rows[: max(num_rows - first, 0)]
            experts[first : first + len(kept)] = kept
        if bool((experts < 0).any()):
            raise RuntimeError(f"vllm: the experts of some tokens of request {output.request_id} were not recorded")
        return experts

    def forget(self) -> None:
        """See `ExpertSource`."""
        self._of_request.clear()


def _num_predicting(output: RequestOutput) -> int:
    """P + R - 1."""
    return len(output.prompt_token_ids or ()) + len(output.outputs[0].token_ids) - 1


def _model_runner(worker: Any) -> Any:
    return worker.model_runner
