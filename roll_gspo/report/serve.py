"""Serve the report of a run that continues: a page on the loopback interface that refreshes itself."""

from __future__ import annotations

import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from roll_gspo.printable import printable
from roll_gspo.report.page import render
from roll_gspo.report.run_folder import read_run

_LOOPBACK = ("127.0.0.1", "localhost")
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ReportServer:
    """Serve the report of one run to whoever has its URL, which holds a token. Nothing else of the folder is served.

    Args:
        folder: of the run.
        port: to listen on; 0 for any free port.

    Raises:
        DataError: the folder holds no metrics.jsonl.
        OSError: the port is in use.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self._token = secrets.token_urlsafe(24)
        self._lock = threading.Lock()
        self._page: tuple[str | None, bytes] = (None, b"")
        self.page()
        server = self

        class Handler(BaseHTTPRequestHandler):
            """Answer one request."""

            def do_GET(self) -> None:
                """Send the page, its version, or a profiler trace."""
                answer = server.answer(self.headers.get("Host", ""), self.path)
                kind, body = answer or ("text/plain", b"not found")
                self.send_response(404 if answer is None else 200)
                for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: the path holds the token."""

        self._server = ThreadingHTTPServer((_LOOPBACK[0], port), Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_LOOPBACK[0]}:{self._server.server_address[1]}/{self._token}/"

    def serve(self) -> None:
        """Answer requests until `close`."""
        self._server.serve_forever()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, host: str, path: str) -> tuple[str, bytes] | None:
        """Return content type and body; None if there is nothing at this path, or for this host.

        A page of another site reaches a loopback server under a host name of that site, so other hosts are refused.
        """
        if host.partition(":")[0] not in _LOOPBACK:
            return None
        token, _, name = urlsplit(path).path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            return None
        if name == "":
            return "text/html; charset=utf-8", self.page()
        if name == "version":
            return "text/plain", self._version().encode()
        trace = unquote(name)
        if trace in read_run(self._folder, num_rollouts=0).traces:
            return "application/gzip", (self._folder / trace).read_bytes()
        return None

    def page(self) -> bytes:
        """Return the page, written anew only if the run has logged something since."""
        with self._lock:
            version = self._version()
            if version != self._page[0]:
                text = printable(render(read_run(self._folder), version))
                self._page = (version, text.encode())
            return self._page[1]

    def _version(self) -> str:
        """Return a text that changes whenever a step is logged."""
        metrics = self._folder / "metrics.jsonl"
        return f"{metrics.stat().st_size}-{metrics.stat().st_mtime_ns}" if metrics.is_file() else ""
