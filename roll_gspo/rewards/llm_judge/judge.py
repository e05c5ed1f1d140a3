"""The reward `llm_judge`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.rewards.llm_judge.cache import AnswerCache
from roll_gspo.rewards.llm_judge.client import Answer, ChatClient, Patience
from roll_gspo.rewards.llm_judge.parsing import make_parser
from roll_gspo.rewards.llm_judge.prompt import DEFAULT_SYSTEM_PROMPT, JudgePrompt

_DEADLINE_S = 300.0
_MAX_SHOWN = 120
_REMINDER = "That has no verdict in the form that was asked for. Give the verdict again, in that form and nothing else."
_OWN_PARAMETERS = ("model", "messages", "stream", "n")


class LlmJudge:
    """The score that a language model gives, by one chat completion a sample.

    Args:
        base_url: of an OpenAI-compatible endpoint, e.g. `https://host/v1`; or leave out both it and `model`, and
            name an `engine`.
        model: as the endpoint knows it.
        api_key_env: environment variable that holds the key; null: none is sent.
        prompt: Jinja template, or the path of one; see `JudgePrompt`. null: a default that asks for "Score: 0-10".
        system_prompt: null: the default prompt's own, none beside a `prompt` of yours.
        parser: how the verdict is read; see `make_parser`.
        max_tokens: limit of the judge's answer. Of one that was cut only the first word is read, by `yes_no`.
        temperature: 0 is greedy.
        extra_body: further parameters of the request, e.g. `{top_p: 0.9}`, or vLLM's `{chat_template_kwargs: ...}`.
        parse_retries: how often a judge whose answer has no verdict is asked for it once more.
        request_timeout_s, max_retries, backoff_s, deadline_s: see `Patience`; the block's `timeout_s` must be above
            deadline_s, else the worker is killed before the judge has given up.
        cache_dir: folder of a cache that several workers and runs share; null: none. It goes by model, messages and
            parameters: give another folder where the weights behind a name have changed.
        engine: a vLLM server of our own (see `JudgeEngine`); `JudgeServers` starts it, and puts `base_url`, `model` and
            `socket` in the place of this.
        socket: of that server.

    Raises:
        ConfigError: arguments are missing or wrong, or the variable of the key is not set.
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
            raise ConfigError("llm_judge: engine: only a run starts one; give base_url and model of a server here")
        if base_url is None or model is None:
            raise ConfigError("llm_judge: give base_url and model, or an engine of our own (engine: {model: ...})")
        positive = {"max_tokens": max_tokens, "request_timeout_s": request_timeout_s, "deadline_s": deadline_s}
        not_negative = {"temperature": temperature, "max_retries": max_retries, "backoff_s": backoff_s}
        not_negative |= {"parse_retries": parse_retries}
        if bad := [k for k, v in positive.items() if v <= 0] + [k for k, v in not_negative.items() if v < 0]:
            raise ConfigError(f"llm_judge: {bad[0]} is {(positive | not_negative)[bad[0]]:g}; raise it")
        extra = dict(extra_body or {})
        if taken := sorted(extra.keys() & {*_OWN_PARAMETERS, "max_tokens", "temperature"}):
            raise ConfigError(f"llm_judge: extra_body.{taken[0]}: the judge sets it; remove it there")
        self._prompt = JudgePrompt(prompt)
        self._system_prompt = DEFAULT_SYSTEM_PROMPT if system_prompt is None and prompt is None else system_prompt
        self._parse, self._reads_cut = make_parser(parser), parser == "yes_no"
        self._parser = parser
        self._parameters = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **extra}
        self._parse_retries = parse_retries
        patience = Patience(request_timeout_s, max_retries, backoff_s, deadline_s)
        self._client = ChatClient(base_url, _key_of(api_key_env), patience, socket)
        self._cache = None if cache_dir is None else AnswerCache(cache_dir)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> float:
        messages = [{"role": "user", "content": self._prompt.render(prompt, response, ground_truth, row)}]
        if self._system_prompt:
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        request = {**self._parameters, "messages": messages}
        if self._cache is not None and (known := self._cache.get(request)) is not None:
            score = self._parse(known)
            if score is not None:  # else it was read by another parser
                return score
        answer, score = self._ask(request)
        if self._cache is not None:
            self._cache.put(request, answer)
        return score

    def _ask(self, request: Mapping[str, Any]) -> tuple[str, float]:
        """(answer, score), with a reminder where the answer has no verdict: the same question would give the same."""
        deadline = self._client.new_deadline()
        messages = list(request["messages"])
        for _ in range(self._parse_retries + 1):
            answer = self._client.complete({**request, "messages": messages}, deadline)
            text = self._readable(answer)
            if (score := self._parse(text)) is not None:
                return text, score
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": _REMINDER}]
        raise RewardError(f"llm_judge: {self._complaint(answer)}")

    def _readable(self, answer: Answer) -> str:
        if not answer.cut:
            return answer.text
        # The last word of what was cut is no verdict, though it may look like one.
        return " ".join(answer.text.split()[:1]) if self._reads_cut else ""

    def _complaint(self, answer: Answer) -> str:
        end = " ".join(answer.text.split())[-_MAX_SHOWN:]
        if answer.cut:
            return f"the answer was cut at max_tokens {self._parameters['max_tokens']}; raise it (it ended in {end!r})"
        return f"no verdict for parser '{self._parser}' in the answer, which ended in {end!r}"


def _key_of(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        hint = " (that looks like a key itself)" if variable.startswith("sk-") else f" '{variable}'"
        raise ConfigError(f"llm_judge: api_key_env: the environment variable{hint} is not set; export it")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"llm_judge: api_key_env: the value of '{variable}' is no header text; check it")
    return key
