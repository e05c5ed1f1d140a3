"""Conversations of one episode, token in and token out: which recorded answers a request of the agent continues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.batch import Completion
from roll_gspo.data.messages import Message
from roll_gspo.data.prompts import encode_chat
from roll_gspo.data.rendering import Tools
from roll_gspo.data.templates import ChatTemplate
from roll_gspo.data.turns import TokenRecord, TurnRenderer
from roll_gspo.roles.agents.sampled_text import SampledText

_PLACE = "request of the agent"


@dataclass
class AgentTurn:
    """An answer of the model.

    Attributes:
        number: number of the answer among those of the episode, from 0.
        answer: the sampled text, without the token that ends the turn.
        num_messages: number of messages of the branch, up to and including the answer.
        invalid: the answer has a call of a tool that cannot be read.
        following: the messages that the agent sent after it.
    """

    number: int
    answer: str
    num_messages: int
    invalid: bool = False
    following: tuple[Message, ...] = ()


@dataclass(eq=False)
class Branch:
    """A conversation in which every request extends the one before.

    Attributes:
        tools: schemas of functions in the requests.
        record: tokens.
        messages: the conversation as templates render it: answers are the text that was sampled.
        compared: the conversation as the agent sees it, each message as `comparable` returns it.
        turns: the answers.
        is_busy: True while the engines sample an answer that will extend the branch.
        num_rewritten: number of turns before which the chat template would have changed the recorded history.
    """

    tools: Tools
    record: TokenRecord
    messages: list[Message] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    turns: list[AgentTurn] = field(default_factory=list)
    is_busy: bool = False
    num_rewritten: int = 0


@dataclass(frozen=True)
class Extension:
    """A request of the agent, which will extend a branch once its answer is sampled.

    Attributes:
        branch: the branch, which is new if it has no answers.
        messages: the messages after its last answer.
        compared: the same as `comparable` returns them.
        given: tokens of these messages; empty if the branch is new, because its prompt contains them.
        rewrites: the chat template would change the recorded history.
    """

    branch: Branch
    messages: tuple[Message, ...]
    compared: tuple[str, ...]
    given: tuple[int, ...] = ()
    rewrites: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of the prompt."""
        return (*self.branch.record.next_prompt, *self.given)

    @property
    def num_response_tokens(self) -> int:
        """Number of tokens after the first prompt of the branch, before the answer."""
        return len(self.branch.record.token_ids) + len(self.given)


class Conversations:
    """The branches of one episode.

    A request whose messages extend a recorded conversation continues its tokens. If the recorded conversation went on
    in another way, or is being continued at the same time, a branch begins whose prompt is the recorded tokens. Any
    other request begins a branch whose messages are encoded afresh.

    Args:
        tokenizer: tokenizer of the model.
        template: chat template.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._num_answers = 0
        self.branches: list[Branch] = []

    @property
    def num_answers(self) -> int:
        """Number of answers in all branches."""
        return self._num_answers

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids)))

    def extend(self, messages: Sequence[Message], tools: Tools) -> Extension:
        """Return how a request continues the recorded conversations. `add` or `drop` must follow.

        Raises:
            DataError: the chat template rejects the conversation.
        """
        compared = [comparable(message) for message in messages]
        found = self._longest(compared, tools)
        if found is None:
            prompt = encode_chat(self._tokenizer, messages, self._template, tools, _PLACE)
            return self._begin(Branch(tools, TokenRecord(tuple(prompt))), messages, compared)
        branch, turn = found
        answer = branch.turns[turn]
        first, end = answer.num_messages, branch.record.turn_ends[turn]
        history, new = branch.messages[:first], tuple(messages[first:])
        tokens = branch.record.token_ids[:end]
        renderer = TurnRenderer(self._tokenizer, self._template, tools, _PLACE)
        given = tuple(renderer.following(history, new, tokens[-1]))
        if branch.is_busy or answer is not branch.turns[-1]:
            prompt = (*branch.record.prompt_ids, *tokens, *given)
            return self._begin(Branch(tools, TokenRecord(prompt)), [*history, *new], compared)
        recorded = self._tokenizer.decode([*branch.record.prompt_ids, *tokens[:-1]])
        branch.is_busy = True
        return Extension(
            branch, new, tuple(compared[first:]), given, rewrites=not renderer.keeps(history, new, recorded)
        )

    def add(self, extension: Extension, completion: Completion, answer: SampledText) -> None:
        """Record an answer.

        Args:
            extension: the request.
            completion: the answer's tokens.
            answer: the answer's text.
        """
        branch = extension.branch
        if branch.turns:
            branch.record.add_given(extension.given)
            branch.turns[-1].following = extension.messages
            branch.num_rewritten += extension.rewrites
        branch.record.add_answer(completion.token_ids, completion.log_probs, completion.version_runs)
        branch.messages += [*extension.messages, {"role": "assistant", "content": answer.text}]
        branch.compared += [*extension.compared, comparable(answer.message)]
        branch.turns.append(AgentTurn(self._num_answers, answer.text, len(branch.messages), answer.invalid))
        branch.is_busy = False
        self._num_answers += 1

    def drop(self, extension: Extension) -> None:
        """Forget a request that is not answered."""
        extension.branch.is_busy = False
        if not extension.branch.turns:
            self.branches.remove(extension.branch)

    def branch_of(self, answer: int) -> Branch:
        """Return the branch that has the answer with this number."""
        return next(branch for branch in self.branches if any(turn.number == answer for turn in branch.turns))

    def _begin(self, branch: Branch, messages: Sequence[Message], compared: Sequence[str]) -> Extension:
        branch.is_busy = True
        self.branches.append(branch)
        return Extension(branch, tuple(messages), tuple(compared))

    def _longest(self, compared: Sequence[str], tools: Tools) -> tuple[Branch, int] | None:
        """Return the branch and the turn after which the request continues, or None. Free ends come first."""
        found: tuple[Branch, int] | None = None
        best = (0, False)
        for branch in self.branches:
            if list(branch.tools) != list(tools):
                continue
            for number, turn in enumerate(branch.turns):
                count = turn.num_messages
                rank = (count, turn is branch.turns[-1] and not branch.is_busy)
                if rank > best and count < len(compared) and branch.compared[:count] == list(compared[:count]):
                    best, found = rank, (branch, number)
        return found


def comparable(message: Message) -> str:
    """Return a text that is equal for messages that say the same.

    Identifiers of calls are ignored, and so is white space around the text of an assistant's message, which many
    programs strip.
    """
    content = str(message.get("content") or "")
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    is_answer = message["role"] == "assistant"
    return json.dumps([message["role"], content.strip() if is_answer else content, message.get("name"), calls])


def _call(call: Any) -> list[Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return [function.get("name"), json.dumps(arguments, sort_keys=True)]
