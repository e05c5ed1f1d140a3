"""Requests of an agent: the part of OpenAI's chat completions that training supports, and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from roll_gspo.data.messages import Message, parse_messages

MODEL_NAME = "policy"
_ROLES = {"developer": "system"}
# Values that mean "not used". Others would change the distribution, which is that of the training.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([], ""),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
}
_IGNORED = ("seed", "user", "metadata", "store", "parallel_tool_calls", "service_tier", "prompt_cache_key")
_WHY = {
    "n": "one answer per request; send several requests",
    "stop": "an answer ends with the token that ends a turn; cut the text in the program",
    "response_format": "answers are sampled freely; describe the format in the prompt",
    "top_logprobs": "only the log-prob of each sampled token is known; set logprobs: true",
    "tool_choice": "the model decides; tool_choice may be auto",
}


class RefusedError(Exception):
    """A request that the endpoint does not answer.

    Attributes:
        status: HTTP status.
        param: the key to look at, or None.
        code: name of the problem for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the JSON body, as OpenAI's clients expect it."""
        error = {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`.

    Attributes:
        messages: the conversation.
        model: name of the model; any is accepted.
        tools: schemas of the functions that the model may call.
        max_tokens, max_completion_tokens: upper limit of the answer's tokens. The limits of the run stay in force.
        temperature, top_p: ignored, because training fixes the sampling.
        logprobs: the answer contains the log-prob of each token.
        stream: the answer is sent as server-sent events.
        stream_options: options of a streamed answer.
    """

    model_config = ConfigDict(extra="allow")
    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = MODEL_NAME
    tools: list[dict[str, Any]] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def max_answer_tokens(self) -> int | None:
        """Upper limit of the answer's tokens that the agent set, or None."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)


class RewardPost(BaseModel):
    """The body of `POST /v1/reward`.

    Attributes:
        reward: added to the reward of the episode.
        done: the episode ends now.
        metrics: numbers to report.
    """

    model_config = ConfigDict(extra="forbid")
    reward: FiniteFloat
    done: bool = False
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)


def parse_chat(body: bytes) -> tuple[ChatRequest, tuple[Message, ...]]:
    """Return the request and its conversation.

    Raises:
        RefusedError: a key is wrong or not supported.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    for key, value in (request.model_extra or {}).items():
        _check_extra(key, value)
    return request, _conversation(request.messages)


def parse_reward(body: bytes) -> RewardPost:
    """Return the reward.

    Raises:
        RefusedError: a key is wrong.
    """
    try:
        return RewardPost.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _check_extra(key: str, value: Any) -> None:
    if value is None or key in _IGNORED or value in _UNUSED.get(key, ()):
        return
    if key == "tool_choice" and value == "none":
        raise RefusedError("tool_choice: none is not supported; send a request without tools", key, "unsupported_value")
    why = _WHY.get(key, "this endpoint does not have it; remove it")
    raise RefusedError(f"{key}: {value!r:.80} is not supported ({why})", key, "unsupported_parameter")


def _conversation(messages: list[dict[str, Any]]) -> tuple[Message, ...]:
    plain = [_plain(message, number) for number, message in enumerate(messages)]
    parsed, problems = parse_messages(plain)
    if problems:
        raise RefusedError(f"{problems[0].detail}; {problems[0].fix}", "messages")
    if parsed[-1]["role"] == "assistant":
        raise RefusedError(
            "messages: the last message is the assistant's, but the model is to write it; end with another message",
            f"messages[{len(parsed) - 1}]",
        )
    return parsed


def _plain(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a message with only the keys that templates know, and with its content as one text."""
    kept = {key: message[key] for key in ("role", "content", "name", "tool_call_id", "tool_calls") if key in message}
    kept["role"] = _ROLES.get(kept.get("role", ""), kept.get("role"))
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(_texts(kept["content"], f"messages[{number}].content"))
    if kept.get("content") is None:
        kept["content"] = ""
    return kept


def _texts(parts: list[Any], place: str) -> Iterator[str]:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RefusedError(f"{place}: a part of type {kind!r} is not supported; send text", place)
        yield part["text"]


def _refusal(error: ValidationError) -> RefusedError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "body"
    return RefusedError(f"{key}: {first['msg']} (got {first['input']!r:.80})", key)
