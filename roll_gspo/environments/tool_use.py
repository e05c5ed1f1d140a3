"""`tool_use`: questions that the model answers with the help of tools.

The model may call tools in several turns. An answer without a call ends the episode, and a reward scores it:

    What is 12 * 34? -> <tool_call>{"name": "calculator", "arguments": {"expression": "12 * 34"}}</tool_call>
    408 -> The product is 408.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from roll_gspo.config.rewards import RewardConfig
from roll_gspo.environments.base import Environment, Reply, Start
from roll_gspo.errors import ConfigError, DataError, PlayError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.tools.calls import FORMATS, Call, CallFormat, MalformedCall
from roll_gspo.tools.running import ToolBox
from roll_gspo.tools.spec import build_tools


@dataclass(frozen=True)
class _Shared:
    """Tools, reward and options of all episodes of a process."""

    box: ToolBox
    call_format: CallFormat
    reward: RewardPool
    show_tools: bool
    max_invalid: int


class ToolUse(Environment):
    """An episode with one question. Its reward is the score of the answer, which is the first turn without a call.

    An episode that ends without an answer has reward 0. A reward that fails, or a tool that is broken, fails the
    episode.
    """

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._row: Mapping[str, Any] = {}
        self._prompt = ""
        self._num_invalid = 0
        self._num_calls = 0

    @classmethod
    def factory(
        cls,
        tools: Sequence[Any],
        reward: str | Mapping[str, Any],
        format: str = "hermes",
        show_tools: bool = True,
        max_invalid: int = 2,
        max_calls: int = 8,
        max_result_chars: int = 4000,
    ) -> Callable[[], Environment]:
        """Build the tools and the reward of a process.

        Args:
            tools: shipped tools, dotted paths, or entries `{type, name, arguments, schema, timeout_s}`.
            reward: shipped reward, the dotted path of a function or class, or a block with the keys of `rewards`.
            format: format of the calls: `hermes` (Qwen), `llama3` or `mistral`.
            show_tools: if True, the chat template renders the schemas of the tools.
            max_invalid: number of turns with a malformed or wrong call after which the episode ends.
            max_calls: largest number of calls per turn, which run at the same time.
            max_result_chars: characters of a result that the model reads; the rest is left out.

        Raises:
            ConfigError, MissingDependencyError, RewardError: an argument is wrong, or something cannot be built.
        """
        if format not in FORMATS:
            hint = did_you_mean(format, list(FORMATS))
            raise ConfigError(f"format is '{format}'{hint}; use one of {', '.join(FORMATS)}")
        call_format = FORMATS[format]
        box = ToolBox(build_tools(tools), call_format.example, max_calls, max_result_chars)
        pool = _reward_pool(reward)
        pool.check()
        shared = _Shared(box, call_format, pool, show_tools, max_invalid)
        return lambda: cls(shared)

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        """Show the conversation of the row."""
        messages = row.get("messages")
        if not messages:
            raise DataError(f"row {row.get('id', '?')}: no messages; give the environment rows of a data file")
        self._row = row
        self._prompt = "\n\n".join(message["content"] or "" for message in messages)
        schemas = tuple(tool.schema for tool in self._shared.box.tools.values())
        return Start(tuple(messages), schemas if self._shared.show_tools else ())

    def step(self, answer: str) -> Reply:
        """Run the calls of the answer, or score it."""
        calls = self._shared.call_format.parse(text_after_thinking("", answer))
        if not calls:
            return self._scored(answer)
        results = self._shared.box.run(calls)
        messages = []
        for call, result in zip(calls, results, strict=True):
            self._num_calls += 1
            messages.append(_message(call, result.text, self._num_calls))
        invalid = any(result.kind == "invalid" for result in results)
        self._num_invalid += invalid
        done = self._num_invalid > self._shared.max_invalid
        metrics = {
            "tool_calls": len(results),
            "tool_errors": sum(result.kind == "error" for result in results),
            "invalid_calls": sum(result.kind == "invalid" for result in results),
        }
        return Reply(() if done else tuple(messages), done=done, invalid=invalid, metrics=metrics)

    def _scored(self, answer: str) -> Reply:
        known = {key: value for key, value in self._row.items() if key not in ("messages", "ground_truth")}
        request = RewardRequest(self._prompt, answer, str(self._row.get("ground_truth", "")), known)
        (result,) = self._shared.reward.score([request])
        if result.failed is not None:
            raise PlayError(_failure(result))
        return Reply(reward=result.score, done=True, metrics={"tool_calls": 0, **result.components})


def _message(call: Call | MalformedCall, text: str, number: int) -> dict[str, Any]:
    """Return the message with the result of a call. Its id has nine digits, which Mistral's templates require."""
    message = {"role": "tool", "content": text, "tool_call_id": f"{number:09d}"}
    if isinstance(call, Call):
        message |= {"name": call.name, "tool_call_id": call.id or message["tool_call_id"]}
    return message


def _reward_pool(reward: str | Mapping[str, Any]) -> RewardPool:
    """Return one process for the reward, which may need the main thread of its process."""
    try:
        block = RewardConfig.model_validate({"worker_cls": reward} if isinstance(reward, str) else reward)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(['reward', *map(str, first['loc'])])}: {first['msg']}") from None
    return RewardPool(
        spec_from_config(block, "reward"),
        num_workers=1,
        timeout_s=block.timeout_s,
        key="reward",
        start_timeout_s=block.start_timeout_s,
        max_memory_mb=block.max_memory_mb,
    )


def _failure(result: RewardResult) -> str:
    return f"the reward failed: {result.failed}\n{result.traceback}".rstrip()
