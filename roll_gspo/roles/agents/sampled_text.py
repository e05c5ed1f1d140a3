"""Text of an answer as the agent receives it: content and calls of tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from roll_gspo.data.messages import Message
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.tools.calls import Call, CallFormat


@dataclass(frozen=True)
class SampledText:
    """The text of an answer.

    Attributes:
        text: what was sampled, without the token that ends the turn.
        content: the text before the calls.
        tool_calls: calls in OpenAI's form.
        invalid: a call cannot be read. The calls then remain in `content`.
    """

    text: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    invalid: bool = False

    @property
    def message(self) -> Message:
        """The message that the agent receives."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return message | {"tool_calls": list(self.tool_calls)} if self.tool_calls else message

    @property
    def finish_reason(self) -> Literal["stop", "tool_calls"]:
        """Reason of an answer that was not cut off."""
        return "tool_calls" if self.tool_calls else "stop"


def read_answer(text: str, call_format: CallFormat | None, number: int) -> SampledText:
    """Separate the calls of an answer from its content. Calls inside the thinking are not read.

    Args:
        text: what was sampled.
        call_format: format of the calls; None reads no calls.
        number: number of the answer, from which calls get their ids.
    """
    after = text_after_thinking("", text)
    calls = () if call_format is None else call_format.parse(after)
    readable = [call for call in calls if isinstance(call, Call)]
    if call_format is None or not calls or len(readable) < len(calls):
        return SampledText(text, text, invalid=bool(calls))
    thinking = text[: len(text) - len(after)]
    # Templates of Mistral require ids of nine letters and digits.
    written = tuple(_written(call, f"{number % 10**6:06d}{place:03d}") for place, call in enumerate(readable))
    return SampledText(text, (thinking + call_format.text_before_calls(after)).strip(), written)


def _written(call: Call, own_id: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {"id": call.id or own_id, "type": "function", "function": function}
