"""An OpenAI endpoint on the loopback device whose answers are the turns of episodes.

A package that drives the model itself gets the address and, as the name of the model, the key of a conversation. Its
request waits until the model has answered.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from aiohttp import web

from roll_gspo.errors import PlayError
from roll_gspo.tools.calls import Call, CallFormat


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer of the model.

    Attributes:
        messages: what follows the answers so far; the whole conversation in the first request.
        tools: schemas of the tools.
        answer: future of the answer's text, in the event loop.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: asyncio.Future[str]


@dataclass
class Conversation:
    """The requests of one episode.

    Attributes:
        call_format: format in which the model writes calls of tools.
        events: requests in order, and what the owner adds, e.g. the end of the episode.
    """

    call_format: CallFormat
    events: SimpleQueue[Any] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self._seen: list[dict[str, Any]] = []
        self._open: ChatRequest | None = None

    def request(self, body: Mapping[str, Any], answer: asyncio.Future[str]) -> None:
        """Add a request.

        Raises:
            PlayError: it does not continue the conversation, or another one is open.
        """
        messages = [_message(message) for message in body["messages"]]
        if self._open is not None and not self._open.answer.done():
            raise PlayError(
                "a second request came before the answer to the first; only one agent may talk to the model"
            )
        known = len(self._seen)
        if known and (messages[:known] != self._seen or messages[known : known + 1] != [_ANSWERED]):
            raise PlayError(
                "a request does not continue the conversation: earlier messages were changed or left out, e.g. by a "
                "compaction; switch it off"
            )
        self._seen = messages
        new = tuple(messages[known + 1 if known else 0 :])
        self._open = ChatRequest(new, tuple(body.get("tools") or ()), answer)
        self.events.put(self._open)


_ANSWERED = {"role": "assistant"}


class ChatEndpoint:
    """Serves `/v1/chat/completions` for the conversations in `conversations`, by key. Lives in the event loop."""

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}
        self.url = ""

    async def start(self) -> None:
        """Listen on a free port."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        conversation = self.conversations.get(body["model"])
        if conversation is None:
            return _error(404, f"there is no conversation {body['model']}")
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            conversation.request(body, answer)
        except PlayError as error:
            conversation.events.put(error)
            return _error(400, str(error))
        message = answer_message(await answer, conversation.call_format)
        reason = "tool_calls" if "tool_calls" in message else "stop"
        if body.get("stream"):
            return await _streamed(request, body, message, reason)
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return web.json_response({**_head("chat.completion", body), "choices": [choice], "usage": _USAGE})


_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def answer_message(text: str, call_format: CallFormat) -> dict[str, Any]:
    """Return the message of an answer, with the calls that it has. A text with a malformed call has none."""
    calls = call_format.parse(text)
    read = [call for call in calls if isinstance(call, Call)]
    if not read or len(read) < len(calls):
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for number, call in enumerate(read)
        ],
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as the chat template reads it. Answers are recorded as tokens, so only their place counts."""
    if message["role"] == "assistant":
        return dict(_ANSWERED)
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise PlayError("a message has other content than text, which is not supported")
        content = "\n".join(part["text"] for part in content)
    kept = {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    return {"role": message["role"], "content": content, **kept}


def _head(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{time.monotonic_ns()}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
    }


async def _streamed(request: web.Request, body: Mapping[str, Any], message: dict[str, Any], reason: str) -> Any:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    calls = [{**call, "index": number} for number, call in enumerate(message.get("tool_calls", ()))]
    delta = {**message, **({"tool_calls": calls} if calls else {})}
    head = _head("chat.completion.chunk", body)
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
    ]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": _USAGE})
    for text in (*map(json.dumps, chunks), "[DONE]"):
        await response.write(f"data: {text}\n\n".encode())
    await response.write_eof()
    return response


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text, "type": "invalid_request_error"}}, status=status)
