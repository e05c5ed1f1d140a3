"""The reward `llm_judge`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.rewards.llm_judge.cache import AnswerCache
from roll_gspo.rewards.llm_judge.client import Answer, ChatClient, RetryPolicy
from roll_gspo.rewards.llm_judge.parsing import make_parser
from roll_gspo.rewards.llm_judge.prompt import DEFAULT_SYSTEM_PROMPT, JudgePrompt

_DEADLINE_S = 300.0
_MAX_QUOTED_CHARS = 120
_REMINDER = "That has no verdict in the form that was asked for. Give the verdict again, in that form and nothing else."
_RESERVED_PARAMETERS = ("model", "messages", "stream", "n")


class LlmJudge:
    """Score a response with a language model, by one chat completion per sample.

    A response without text after the thinking scores 0 without a request.

    Args:
        base_url: URL of an OpenAI-compatible endpoint, e.g. `https://host/v1`. Alternatively, omit it and `model` and
            set `engine`.
        model: name of the model at the endpoint.
        api_key_env: environment variable with the API key; null to send none.
        prompt: Jinja template or its path; see `JudgePrompt`. null: a default that asks for "Score: 0-10".
        system_prompt: system message. null: a default if `prompt` is null, else none.
        parser: parser of the verdict; see `make_parser`.
        max_tokens: token limit of the judge's answer. A truncated answer has no verdict, except that `yes_no` reads
            its first word.
        temperature: sampling temperature; 0 is greedy.
        extra_body: further parameters of the request, e.g. `{top_p: 0.9}`, or vLLM's `{chat_template_kwargs: ...}`.
        parse_retries: number of times that the judge is asked again if its answer has no verdict.
        request_timeout_s, max_retries, backoff_s, deadline_s: see `RetryPolicy`. `deadline_s` must be below the
            `timeout_s` of the block, after which the worker process is killed.
        cache_dir: folder of a cache that workers and runs share; null for none. Its key is model, messages and
            parameters, so use another folder if the weights behind a model name change.
        engine: settings of a vLLM server that the run starts (see `JudgeEngine`). `JudgeServers` replaces them with
            `base_url`, `model` and `socket`.
        socket: Unix socket of that server.

    Raises:
        ConfigError: arguments are missing or invalid, or the variable of the API key is not set.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        prompt: str | None = None,
        system_prompt: str | None = None,
        parser: str = "score_0_10",
        max_tokens: int = 512,
        temperature: float = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        parse_retries: int = 1,
        request_timeout_s: float = 60.0,
        max_retries: int = 4,
        backoff_s: float = 1.0,
        deadline_s: float = _DEADLINE_S,
        cache_dir: str | None = None,
        engine: Mapping[str, Any] | None = None,
        socket: str | None = None,
    ) -> None:
        if engine is not None:
            raise ConfigError("llm_judge: engine works in a run only; set base_url and model of a running server")
        if base_url is None or model is None:
            raise ConfigError("llm_judge: base_url or model is missing; set both, or engine: {model: ...}")
        positive = {"max_tokens": max_tokens, "request_timeout_s": request_timeout_s, "deadline_s": deadline_s}
        not_negative = {"temperature": temperature, "max_retries": max_retries, "backoff_s": backoff_s}
        not_negative |= {"parse_retries": parse_retries}
        if bad := [k for k, v in positive.items() if v <= 0] + [k for k, v in not_negative.items() if v < 0]:
            raise ConfigError(f"llm_judge: {bad[0]} is too low ({(positive | not_negative)[bad[0]]:g}); raise it")
        extra = dict(extra_body or {})
        if reserved := sorted(extra.keys() & {*_RESERVED_PARAMETERS, "max_tokens", "temperature"}):
            raise ConfigError(f"llm_judge: extra_body.{reserved[0]} is set by llm_judge; remove it")
        self._prompt = JudgePrompt(prompt)
        self._system_prompt = DEFAULT_SYSTEM_PROMPT if system_prompt is None and prompt is None else system_prompt
        self._parse, self._reads_truncated = make_parser(parser), parser == "yes_no"
        self._parser_name = parser
        self._parameters = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **extra}
        self._parse_retries = parse_retries
        retry = RetryPolicy(request_timeout_s, max_retries, backoff_s, deadline_s)
        self._client = ChatClient(base_url, _read_api_key(api_key_env), retry, socket)
        self._cache = None if cache_dir is None else AnswerCache(cache_dir)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> float:
        if not text_after_thinking(prompt, response).strip():
            return 0.0
        messages = [{"role": "user", "content": self._prompt.render(prompt, response, ground_truth, row)}]
        if self._system_prompt:
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        request = {**self._parameters, "messages": messages}
        if self._cache is not None and (cached := self._cache.get(request)) is not None:
            score = self._parse(cached)
            if score is not None:  # otherwise the answer was cached with another parser
                return score
        answer, score = self._ask(request)
        if self._cache is not None:
            self._cache.put(request, answer)
        return score

    def _ask(self, request: Mapping[str, Any]) -> tuple[str, float]:
        """Return (answer, score). If an answer has no verdict, a reminder is appended to the messages and sent."""
        deadline = self._client.new_deadline()
        messages = list(request["messages"])
        for _ in range(self._parse_retries + 1):
            answer = self._client.complete({**request, "messages": messages}, deadline)
            text = self._text_to_parse(answer)
            if (score := self._parse(text)) is not None:
                return text, score
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": _REMINDER}]
        raise RewardError(f"llm_judge: {self._no_verdict_reason(answer)}")

    def _text_to_parse(self, answer: Answer) -> str:
        if not answer.truncated:
            return answer.text
        # The last word of a truncated answer may look like a verdict.
        return " ".join(answer.text.split()[:1]) if self._reads_truncated else ""

    def _no_verdict_reason(self, answer: Answer) -> str:
        end = " ".join(answer.text.split())[-_MAX_QUOTED_CHARS:]
        if answer.truncated:
            return f"the answer was truncated at max_tokens {self._parameters['max_tokens']} ({end!r}); raise it"
        return f"parser '{self._parser_name}' found no verdict in the answer, which ends with {end!r}"


def _read_api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        shown = " (its name looks like a key)" if variable.startswith("sk-") else f" '{variable}'"
        raise ConfigError(f"llm_judge: api_key_env: the environment variable{shown} is not set; export it")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"llm_judge: api_key_env: the value of '{variable}' has characters that HTTP headers forbid; remove them"
        )
    return key
