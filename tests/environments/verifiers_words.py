"""Tasksets of verifiers for the tests: a question, a talk with a user, and a harness that runs in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import verifiers.v1 as vf

__all__ = ["Chat", "Words"]
LETTER = {"type": "function", "function": {"name": "letter", "description": "Return a letter.", "parameters": {}}}


class WordData(vf.TaskData):
    answer: str = ""


class WordTask(vf.Task[WordData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        if trace.last_reply == "crash":
            raise ValueError("cannot score this")
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class WordsConfig(vf.TasksetConfig):
    suffix: str = ""


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self) -> Iterable[WordTask]:
        for word in ("ant", "bee", "cow"):
            data = WordData(prompt=f"Spell {word}{self.config.suffix}.", system_prompt="Be brief.", answer=word)
            yield WordTask(data, self.config.task)


class ChatConfig(vf.HarnessConfig):
    rewrites: bool = False


class Chat(vf.Harness[ChatConfig]):
    """Asks the model until it calls no tool. The only tool returns a letter of the answer."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
        tool_interception_url: str | None = None,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        async with httpx.AsyncClient(base_url=endpoint, timeout=None) as client:
            while True:
                body = {"model": ctx.model, "messages": messages, "tools": [LETTER]}
                headers = {"Authorization": f"Bearer {secret}"}
                response = await client.post("/chat/completions", json=body, headers=headers)
                if response.status_code != 200:
                    return vf.ProgramResult(1, "", response.text)
                message = response.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(0, "", "")
                if self.config.rewrites:
                    messages[1] = {"role": "user", "content": "a summary"}
                for call in message["tool_calls"]:
                    place = json.loads(call["function"]["arguments"])["place"]
                    content = str(getattr(data, "answer", ""))[place]
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
