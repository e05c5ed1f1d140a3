"""Chat completions over HTTP, with patience: retries, backoff, deadline. The key never appears in an error."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from roll_gspo.errors import ConfigError, RewardError

_RETRIED = (408, 429)  # beside 5xx
_LONGEST_BACKOFF_S = 30.0
_MAX_BODY_CHARS = 200
_COMPLETIONS = "/chat/completions"


@dataclass(frozen=True)
class Patience:
    """How long a judge is waited for.

    Attributes:
        request_timeout_s: of one HTTP request, for connecting and between bytes.
        max_retries: further requests after one that failed for a reason that may pass.
        backoff_s: wait before the first retry; it doubles each time, up to 30 s, less up to half at random, so that
            workers do not come back all at once. A server's Retry-After has precedence.
        deadline_s: for all of it.
    """

    request_timeout_s: float = 60.0
    max_retries: int = 4
    backoff_s: float = 1.0
    deadline_s: float = 300.0


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: of the first choice.
        cut: it was ended by the limit of tokens.
    """

    text: str
    cut: bool


class _Passing(Exception):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ChatClient:
    """One endpoint.

    Args:
        base_url: as OpenAI clients take it, e.g. `https://host/v1` (ROLL's, with `/chat/completions`, do as well).
        api_key: sent as a bearer token; null sends none.
        patience: see there.
        socket: path of a Unix socket to connect to instead of the URL's host.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, base_url: str, api_key: str | None, patience: Patience, socket: str | None = None) -> None:
        self._url = _checked_url(base_url)
        self._api_key = api_key
        self._patience = patience
        # No trust in proxies of the environment for a server that is reached by a file.
        transport = httpx2.HTTPTransport(uds=socket) if socket is not None else None
        headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._http = httpx2.Client(
            headers=headers, timeout=patience.request_timeout_s, transport=transport, trust_env=socket is None
        )

    def complete(self, request: Mapping[str, Any], deadline: float | None = None) -> Answer:
        """Ask once, and again where that may help.

        Args:
            request: body of the request.
            deadline: `time.monotonic()` by which to give up; default: `deadline_s` from now.

        Raises:
            RewardError: refused for good, or all tries failed; with the last reason.
        """
        deadline = self.new_deadline() if deadline is None else deadline
        tries = 0
        while True:
            try:
                return self._once(request, deadline)
            except _Passing as failure:
                reason, wait_s = str(failure), failure.wait_s
            tries += 1
            if tries > self._patience.max_retries:
                raise RewardError(f"llm_judge: no answer after {tries} tries, the last: {reason}")
            wait_s = self._backoff(tries) if wait_s is None else wait_s
            if time.monotonic() + wait_s >= deadline:
                raise RewardError(
                    f"llm_judge: no answer after {tries} tries, the last: {reason}; the next would be in {wait_s:.1f} "
                    f"s, after the deadline_s of {self._patience.deadline_s:g}"
                )
            time.sleep(wait_s)

    def new_deadline(self) -> float:
        """`time.monotonic()` when a sample that starts now is given up."""
        return time.monotonic() + self._patience.deadline_s

    def _once(self, request: Mapping[str, Any], deadline: float) -> Answer:
        timeout_s = max(0.001, min(self._patience.request_timeout_s, deadline - time.monotonic()))
        try:
            response = self._http.post(self._url, json=dict(request), timeout=timeout_s)
        except httpx2.TimeoutException as error:
            raise _Passing(f"timeout after {timeout_s:.3g} s ({type(error).__name__})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Passing(self._shown(f"{type(error).__name__}: {error}")) from None
        if response.is_success:
            return self._answer(response)
        said = f"HTTP {response.status_code}: {self._shown(response.text)}"
        if response.status_code in _RETRIED or response.status_code >= 500:
            raise _Passing(said, _retry_after(response.headers.get("Retry-After")))
        raise RewardError(f"llm_judge: {self._url} refused the request: {said}")

    def _answer(self, response: httpx2.Response) -> Answer:
        try:
            (choice, *_) = response.json()["choices"]
            text = choice["message"]["content"]
            cut = choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            text, cut = None, False
        if not isinstance(text, str):
            raise _Passing(f"no chat completion with a text came back: {self._shown(response.text)}")
        return Answer(text, cut)

    def _backoff(self, tries: int) -> float:
        full = min(_LONGEST_BACKOFF_S, self._patience.backoff_s * 2.0 ** (tries - 1))
        return full * random.uniform(0.5, 1.0)

    def _shown(self, text: str) -> str:
        """One short line. Servers like to repeat the key that they refuse: it goes out before anything is cut."""
        with contextlib.suppress(ValueError, LookupError, TypeError):  # the usual form of an error
            text = str(json.loads(text)["error"]["message"])
        text = " ".join((text.replace(self._api_key, "***") if self._api_key else text).split())
        return text if len(text) <= _MAX_BODY_CHARS else text[:_MAX_BODY_CHARS] + "..."


def _checked_url(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"llm_judge: base_url: {error}") from None
    if url.userinfo:
        raise ConfigError("llm_judge: base_url holds a user or password; name a variable in api_key_env instead")
    if url.scheme not in ("http", "https") or not url.host or url.query:
        raise ConfigError(f"llm_judge: base_url '{base_url}' is no address such as https://host/v1")
    return base_url.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS


def _retry_after(value: str | None) -> float | None:
    """Seconds that the header asks for, which may be a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
