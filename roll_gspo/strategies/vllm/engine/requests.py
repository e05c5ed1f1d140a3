"""Requests of a vLLM engine as a `Decoder`: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from roll_gspo.strategies.streaming import Response
from roll_gspo.strategies.vllm.engine.adapters import AdapterSlots
from roll_gspo.strategies.vllm.engine.routed_experts import ExpertSource


class _Running(NamedTuple):
    """A response, the ID that vLLM gave to its request, and the adapter that samples it, with its version."""

    response: Response
    request_id: str
    adapter: LoRARequest | None
    version: int | None


class VllmDecoder:
    """Samples responses with the engine of an `LLM` in this process.

    vLLM returns a request once, when it ends, because an output after every step would cost an object per token. Tokens
    of an unfinished request are read from its state in vLLM, which is an internal interface (vLLM 0.32).

    Args:
        llm: the engine.
        experts: source of routed experts; None records none.
        adapters: the engine's adapters; None if updates replace all weights.

    Attributes:
        version: version of the engine's weights, or of the adapter of new requests; None until the first update.
    """

    def __init__(self, llm: LLM, experts: ExpertSource | None, adapters: AdapterSlots | None = None) -> None:
        self._engine = llm.llm_engine
        self._experts = experts
        self._adapters = adapters
        self._running: dict[int, _Running] = {}
        self.version: int | None = None

    def add(self, responses: Sequence[Response]) -> None:
        """Add one request per response."""
        adapter = None if self._adapters is None else self._adapters.newest
        for response in responses:
            request_id = self._engine.add_request(
                str(response.key),
                {"prompt_token_ids": [*response.prompt, *response.token_ids]},
                _sampling_params(response),
                lora_request=adapter,
            )
            self._running[response.key] = _Running(response, request_id, adapter, self.version)

    def step(self) -> list[Response]:
        """Run one step of the engine."""
        ended = []
        for output in self._engine.step():
            assert isinstance(output, RequestOutput)
            running = self._running.pop(int(output.request_id))
            self._finish(running, output.outputs[0])
            if self._experts is not None:
                running.response.routed_experts = self._experts.take(output)
            ended.append(running.response)
        if ended:
            self._free_adapters()
        return ended

    def _finish(self, running: _Running, output: CompletionOutput) -> None:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vllm: a response ended with '{output.finish_reason}'; see the engine's log")
        self._append(running, output.token_ids, output.logprobs)
        running.response.finish_reason = output.finish_reason

    def read(self, responses: Iterable[Response]) -> None:
        """Append the sampled tokens of running responses, from vLLM's state of their requests."""
        for response in responses:
            running = self._running[response.key]
            state = self._engine.output_processor.request_states[running.request_id]
            assert state.detokenizer is not None and state.logprobs_processor is not None
            self._append(running, state.detokenizer.output_token_ids, state.logprobs_processor.logprobs)

    def _append(self, running: _Running, token_ids: Sequence[int], log_probs: Any) -> None:
        """Append the tokens that are new, given all that the request has sampled."""
        assert isinstance(log_probs, FlatLogprobs) and len(log_probs) == len(token_ids)
        new = running.response.num_sampled
        # The sampled token is the first of each position.
        chosen = [log_probs.logprobs[first] for first in log_probs.start_indices[new:]]
        version = self.version if running.adapter is None else running.version
        running.response.extend(token_ids[new:], chosen, version)

    def remove(self, responses: Iterable[Response]) -> None:
        """Abort the requests of responses."""
        request_ids = [self._running.pop(r.key).request_id for r in responses if r.key in self._running]
        if not request_ids:
            return
        self._engine.abort_request(request_ids, internal=True)
        if self._experts is not None:
            self._experts.forget(request_ids)
        self._free_adapters()

    def use_newest_adapter(self) -> None:
        """Let requests that have sampled nothing use the newest adapter. Call `read` first, and `version` is set.

        If too many versions have requests, those of the oldest ones continue with the newest adapter as well. Adapters
        without requests are removed.
        """
        if self._adapters is None or self._adapters.newest is None:
            return
        moved: list[Response] = []
        older: dict[int, list[Response]] = {}
        for response, _, adapter, _ in self._running.values():
            if adapter is None or adapter.lora_int_id == self._adapters.newest.lora_int_id:
                continue
            (older.setdefault(adapter.lora_int_id, []) if response.num_sampled else moved).append(response)
        for number in sorted(older)[: max(len(older) + 1 - self._adapters.versions, 0)]:
            moved += older[number]
        self.remove(moved)
        for response in moved:
            response.restart()
        self.add(moved)
        self._free_adapters()

    def _free_adapters(self) -> None:
        if self._adapters is not None:
            self._adapters.free({r.adapter.lora_int_id for r in self._running.values() if r.adapter is not None})


def _sampling_params(response: Response) -> SamplingParams:
    sampling = response.sampling
    return SamplingParams(
        seed=response.seed,
        max_tokens=response.limit - response.num_known,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # only `stop_token_ids` end a response
        logprobs=0,
        flat_logprobs=True,  # numbers instead of an object per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
