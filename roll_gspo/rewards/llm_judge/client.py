"""Client for chat completions over HTTP with retries, backoff and a deadline. Errors never contain the API key."""

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

_RETRIED_STATUS = (408, 429)  # besides 5xx
_MAX_BACKOFF_S = 30.0
_MAX_BODY_CHARS = 200
_COMPLETIONS = "/chat/completions"


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts and retries of the requests for one sample.

    Attributes:
        request_timeout_s: timeout of one HTTP request, for connecting and between bytes.
        max_retries: number of retries after a transient failure.
        backoff_s: wait before the first retry. It doubles with each retry, up to 30 s. Up to half of it is subtracted
            at random, so that workers do not retry at the same time. A Retry-After header takes precedence.
        deadline_s: time limit for all requests of a sample.
    """

    request_timeout_s: float = 60.0
    max_retries: int = 4
    backoff_s: float = 1.0
    deadline_s: float = 300.0


@dataclass(frozen=True)
class Answer:
    """Text of a chat completion.

    Attributes:
        text: text of the first choice.
        truncated: True if the token limit ended it.
    """

    text: str
    truncated: bool


class _TransientError(Exception):
    """A failure that a retry may fix; `wait_s` is the wait that the server requested, or None."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ChatClient:
    """Client of one endpoint.

    Args:
        base_url: base URL as OpenAI clients use it, e.g. `https://host/v1`. ROLL's form, which ends with
            `/chat/completions`, is also accepted.
        api_key: bearer token; None to send none.
        retry: timeouts and retries.
        socket: path of a Unix socket to connect to instead of the host of the URL.

    Raises:
        ConfigError: the URL is invalid.
    """

    def __init__(self, base_url: str, api_key: str | None, retry: RetryPolicy, socket: str | None = None) -> None:
        self._url = _completions_url(base_url)
        self._api_key = api_key
        self._retry = retry
        # A server behind a Unix socket must not be reached through a proxy from the environment.
        transport = httpx2.HTTPTransport(uds=socket) if socket is not None else None
        headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._http = httpx2.Client(
            headers=headers, timeout=retry.request_timeout_s, transport=transport, trust_env=socket is None
        )

    def complete(self, request: Mapping[str, Any], deadline: float | None = None) -> Answer:
        """Send a request, with retries after transient failures.

        Args:
            request: body of the request.
            deadline: time at which to stop, in seconds of `time.monotonic()`; default: `deadline_s` from now.

        Raises:
            RewardError: the server refused the request, or all attempts failed. The message has the last reason.
        """
        deadline = self.new_deadline() if deadline is None else deadline
        attempts = 0
        while True:
            try:
                return self._post(request, deadline)
            except _TransientError as failure:
                reason, wait_s = str(failure), failure.wait_s
            attempts += 1
            if attempts > self._retry.max_retries:
                raise RewardError(f"llm_judge: no answer after {attempts} attempts; last failure: {reason}")
            wait_s = self._backoff(attempts) if wait_s is None else wait_s
            if time.monotonic() + wait_s >= deadline:
                raise RewardError(
                    f"llm_judge: no answer after {attempts} attempts; last failure: {reason}; the next attempt, in "
                    f"{wait_s:.1f} s, would exceed deadline_s {self._retry.deadline_s:g}"
                )
            time.sleep(wait_s)

    def new_deadline(self) -> float:
        """Return the deadline of a sample that starts now, in seconds of `time.monotonic()`."""
        return time.monotonic() + self._retry.deadline_s

    def _post(self, request: Mapping[str, Any], deadline: float) -> Answer:
        timeout_s = max(0.001, min(self._retry.request_timeout_s, deadline - time.monotonic()))
        try:
            response = self._http.post(self._url, json=dict(request), timeout=timeout_s)
        except httpx2.TimeoutException as error:
            raise _TransientError(f"timeout after {timeout_s:.3g} s ({type(error).__name__})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _TransientError(self._redact(f"{type(error).__name__}: {error}")) from None
        if response.is_success:
            return self._parse_answer(response)
        reason = f"HTTP {response.status_code}: {self._redact(response.text)}"
        if response.status_code in _RETRIED_STATUS or response.status_code >= 500:
            raise _TransientError(reason, _retry_after(response.headers.get("Retry-After")))
        raise RewardError(f"llm_judge: {self._url} refused the request: {reason}")

    def _parse_answer(self, response: httpx2.Response) -> Answer:
        try:
            (choice, *_) = response.json()["choices"]
            text = choice["message"]["content"]
            truncated = choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            text, truncated = None, False
        if not isinstance(text, str):
            raise _TransientError(f"the response has no chat completion with text: {self._redact(response.text)}")
        return Answer(text, truncated)

    def _backoff(self, attempts: int) -> float:
        full = min(_MAX_BACKOFF_S, self._retry.backoff_s * 2.0 ** (attempts - 1))
        return full * random.uniform(0.5, 1.0)

    def _redact(self, text: str) -> str:
        """Return one short line without the API key, which some servers repeat when they refuse it."""
        with contextlib.suppress(ValueError, LookupError, TypeError):  # usual form of an error body
            text = str(json.loads(text)["error"]["message"])
        text = " ".join((text.replace(self._api_key, "***") if self._api_key else text).split())
        return text if len(text) <= _MAX_BODY_CHARS else text[:_MAX_BODY_CHARS] + "..."


def _completions_url(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"llm_judge: base_url is no URL ({error}); use the form https://host/v1") from None
    if url.userinfo:
        raise ConfigError("llm_judge: base_url contains a user or password; use api_key_env instead")
    if url.scheme not in ("http", "https") or not url.host or url.query:
        raise ConfigError(f"llm_judge: base_url '{base_url}' is invalid; use the form https://host/v1")
    return base_url.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has a number or a date, or None if there are none."""
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
