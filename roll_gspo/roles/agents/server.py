"""Loopback endpoint in OpenAI's form. It checks requests and hands them to the thread that plays the episodes."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from roll_gspo.data.messages import Message
from roll_gspo.errors import RollGspoError
from roll_gspo.roles.agents.protocol import ChatRequest, RefusedError, RewardPost, parse_chat, parse_reward
from roll_gspo.roles.agents.responses import Answer, completion_body, completion_events, model_body, models_body

_MAX_BODY_BYTES = 16 << 20
_START_TIMEOUT_S, _STOP_TIMEOUT_S = 30.0, 10.0
_DISCONNECT_CHECK_S = 0.5
_NOT_RETRIED = {"x-should-retry": "false"}  # OpenAI's client repeats requests with status 408, 409, 429 and 5xx


@dataclass(eq=False)
class ChatCall:
    """A request for an answer that waits for the playing thread. `answer` is cancelled if the agent hangs up."""

    api_key: str
    request: ChatRequest
    messages: tuple[Message, ...]
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(eq=False)
class RewardCall:
    """A posted reward that waits for the playing thread."""

    api_key: str
    post: RewardPost
    answer: Future[None] = field(default_factory=Future)


Inbox = SimpleQueue[ChatCall | RewardCall]


@dataclass(frozen=True)
class _Session:
    api_key: str
    inbox: Inbox


class AgentServer:
    """HTTP server on the loopback interface, in a thread. Each episode has a random key, which is valid until it ends.

    Args:
        answer_timeout_s: seconds that a request waits for its answer.

    Raises:
        RollGspoError: the server does not start.
    """

    def __init__(self, answer_timeout_s: float) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._sessions: dict[int, _Session] = {}
        self._numbers = itertools.count()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        options = {"lifespan": "off", "log_config": None, "access_log": False, "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(self._application(), **options))
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="agent endpoint", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RollGspoError(f"agent: the endpoint {self.base_url} did not start within {_START_TIMEOUT_S:g} s")
            time.sleep(0.01)

    def open(self, inbox: Inbox) -> str:
        """Return a new API key. The requests that bear it go to `inbox`."""
        number = next(self._numbers)
        api_key = f"{number}-{secrets.token_urlsafe(32)}"
        self._sessions[number] = _Session(api_key, inbox)
        return api_key

    def revoke(self, api_key: str) -> None:
        """Answer no more requests with this key."""
        self._sessions.pop(_number_of(api_key), None)

    def close(self) -> None:
        """Stop the server."""
        self._sessions.clear()
        self._server.should_exit = True
        self._thread.join(_STOP_TIMEOUT_S)
        self._socket.close()

    # in the thread of the server

    def _application(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/reward", self._reward, methods=["POST"]),
            Route("/v1/models", self._constant(models_body()), methods=["GET"]),
            Route("/v1/models/{name:path}", self._constant(model_body()), methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={RefusedError: _refuse, HTTPException: _refuse})

    def _constant(self, body: dict[str, Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            self._session(request)
            return JSONResponse(body)

        return answer

    async def _chat(self, request: Request) -> Response:
        session = self._session(request)
        body, messages = parse_chat(await _body(request))
        call = ChatCall(session.api_key, body, messages)
        session.inbox.put(call)
        answer: Answer = await self._wait(request, call.answer, "an answer of the model")
        if body.stream:
            return StreamingResponse(completion_events(answer, body), media_type="text/event-stream")
        return JSONResponse(completion_body(answer, body))

    async def _reward(self, request: Request) -> Response:
        session = self._session(request)
        call = RewardCall(session.api_key, parse_reward(await _body(request)))
        session.inbox.put(call)
        await self._wait(request, call.answer, "recording a reward")
        return JSONResponse({"ok": True})

    def _session(self, request: Request) -> _Session:
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        found = self._sessions.get(_number_of(key))
        if found is None or not hmac.compare_digest(found.api_key.encode(), key.encode()):
            raise RefusedError(
                "the API key is unknown or its episode has ended; use OPENAI_API_KEY of the program's environment",
                code="invalid_api_key",
                status=401,
            )
        return found

    async def _wait(self, request: Request, answer: Future[Any], what: str) -> Any:
        """Return what the playing thread answers. Cancel the request if the agent hangs up or the wait is too long."""
        waiting = asyncio.wrap_future(answer)
        deadline = time.monotonic() + self._answer_timeout_s
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=_DISCONNECT_CHECK_S)
            late = time.monotonic() > deadline
            if not waiting.done() and (late or await request.is_disconnected()):
                waiting.cancel()
                message = f"{what} took longer than {self._answer_timeout_s:g} s (agent.timeout_s)"
                raise RefusedError(message, code="timeout", status=504)
        return waiting.result()


def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{error.detail}; this endpoint has /v1/chat/completions, /v1/models and /v1/reward"
        error = RefusedError(message, code="not_found", status=error.status_code)
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body(), error.status, _NOT_RETRIED)


def _number_of(key: str) -> int:
    number, _, _ = key.partition("-")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 19 else -1


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            message = f"the body has more than {_MAX_BODY_BYTES:,} bytes; send shorter messages"
            raise RefusedError(message, code="request_too_large", status=413)
    return bytes(body)
