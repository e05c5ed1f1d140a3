"""A local server of the chat completions protocol with scripted replies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """A scripted HTTP response.

    Attributes:
        text: text of a chat completion, which is the body unless `raw` is set.
        status: status code.
        headers: further headers.
        raw: body to send unchanged.
        finish_reason: finish reason of the chat completion.
        wait: event to wait for, up to 60 s, before the response is sent.
        hang_up: if True, the connection is closed without a response.
    """

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None
    finish_reason: str = "stop"
    wait: threading.Event | None = None
    hang_up: bool = False

    def body(self) -> bytes:
        """Return the body of the response."""
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        completion = {"object": "chat.completion", "choices": [{**choice, "finish_reason": self.finish_reason}]}
        return (json.dumps(completion) if self.raw is None else self.raw).encode()


@dataclass
class Endpoint:
    """URL of a running server, and the requests that it has received.

    Attributes:
        base_url: URL for OpenAI clients.
        requests: bodies of the requests.
        keys: Authorization header of each request.
        paths: path of each request.
    """

    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving(replies: Callable[[dict[str, Any]], Reply] | list[Reply]) -> Iterator[Endpoint]:
    """Run a server that sends the replies in order and repeats the last one, or the reply that a function returns."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                index = len(endpoint.requests)
                endpoint.requests.append(request)
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.paths.append(self.path)
            reply = replies[min(index, len(replies) - 1)] if isinstance(replies, list) else replies(request)
            if reply.wait is not None:
                reply.wait.wait(60)
            if reply.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            body = reply.body()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients may disconnect early  # pyright: ignore[reportAttributeAccessIssue]
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
