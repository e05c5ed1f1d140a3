"""Answers of the model in the form of OpenAI's chat completions, whole or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from roll_gspo.roles.agents.protocol import MODEL_NAME, ChatRequest


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        completion_id: identifier of the answer.
        content: the text, without tool calls.
        tool_calls: calls in OpenAI's form.
        finish_reason: why the answer ended.
        prompt_tokens, completion_tokens: number of tokens.
        tokens: text and log-prob of each sampled token.
        version: newest version of the weights that sampled it, if known.
    """

    completion_id: str
    content: str
    tool_calls: tuple[dict[str, Any], ...]
    finish_reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[tuple[str, float], ...]
    version: int | None = None


def completion_body(answer: Answer, request: ChatRequest) -> dict[str, Any]:
    """Return the body of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.tool_calls:
        message |= {"content": answer.content or None, "tool_calls": answer.tool_calls}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _log_probs(answer) if request.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    return _head(answer, request, "chat.completion") | {"choices": [choice], "usage": _usage(answer)}


def completion_events(answer: Answer, request: ChatRequest) -> Iterator[str]:
    """Yield the server-sent events of a chat completion, which is complete already."""
    head = _head(answer, request, "chat.completion.chunk")
    with_usage = request.stream_options is not None and request.stream_options.include_usage

    def event(delta: dict[str, Any], reason: str | None = None, log_probs: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return _event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}))

    yield event({"role": "assistant", "content": ""})
    if answer.content or request.logprobs:
        yield event({"content": answer.content}, log_probs=_log_probs(answer) if request.logprobs else None)
    if answer.tool_calls:
        yield event({"tool_calls": [{"index": index, **call} for index, call in enumerate(answer.tool_calls)]})
    yield event({}, answer.finish_reason)
    if with_usage:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def models_body() -> dict[str, Any]:
    """Return the body of the list of models, which has one entry."""
    return {"object": "list", "data": [model_body()]}


def model_body() -> dict[str, Any]:
    """Return the description of the model."""
    return {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "roll_gspo"}


def _head(answer: Answer, request: ChatRequest, kind: str) -> dict[str, Any]:
    fingerprint = None if answer.version is None else f"weights-{answer.version}"
    return {
        "id": answer.completion_id,
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": fingerprint,
    }


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _log_probs(answer: Answer) -> dict[str, Any]:
    tokens = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in answer.tokens
    ]
    return {"content": tokens, "refusal": None}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
