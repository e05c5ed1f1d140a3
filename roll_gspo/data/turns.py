"""Token ids of a conversation that grows turn by turn. What a model sampled is never encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.data.messages import Message
from roll_gspo.data.rendering import Tools, apply_template
from roll_gspo.data.templates import PROBE, ChatTemplate
from roll_gspo.errors import DataError


class TurnRenderer:
    """Renders the messages that follow an answer of the model.

    Args:
        tokenizer: tokenizer of the model.
        template: chat template.
        tools: schemas of the functions that the model may call.
        place: `file:line` of the conversation, for error messages.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, tools: Tools = (), place: str = "conversation") -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._tools = tools
        self._place = place

    def following(self, history: Sequence[Message], new: Sequence[Message], last_token: int) -> list[int]:
        """Return the tokens from the end of the model's answer to the header of its next one.

        Args:
            history: the conversation up to and including the answer.
            new: the messages that follow it, at least one.
            last_token: last token of the answer. If it is the token that ends a turn in the template, it is not
                repeated; an answer that was cut off is ended first.

        Raises:
            DataError: the template rejects the conversation, or does not render the answer before the new messages.
        """
        text = self._after_answer(history, new)
        token_ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return token_ids[1:] if token_ids[:1] == [last_token] else token_ids

    def keeps(self, history: Sequence[Message], new: Sequence[Message], recorded: str) -> bool:
        """Return whether the template renders the history as it was recorded.

        Some templates drop the thinking of earlier answers or cut old messages. The recorded tokens then differ from
        the prompt that the template would make. A template that rejects the history makes none.

        Args:
            history: the conversation up to and including the model's answer, with the text that it sampled.
            new: the messages that follow it.
            recorded: text of the recorded tokens, special tokens included, without the end of the last turn.
        """
        try:
            return self._render([*history, *new]).startswith(recorded)
        except DataError:
            return True

    def _after_answer(self, history: Sequence[Message], new: Sequence[Message]) -> str:
        """Return the rendered text after the content of the last answer."""
        probe = {**history[-1], "content": PROBE}
        _, found, text = self._rendered_end(history[:-1], [probe, *new]).rpartition(PROBE)
        if not found:
            raise DataError(
                f"{self._place}: the chat template renders no content of an assistant message before "
                f"{', '.join(message['role'] for message in new)}; use a template that renders all turns"
            )
        return text

    def _rendered_end(self, history: Sequence[Message], end: Sequence[Message]) -> str:
        """Return a rendered conversation that ends with the messages of `end`.

        Templates that check the order of roles reject a result after a call that is part of a text, e.g. Mistral's. The
        turns between the last message of the user and `end` are then left out: they do not change the text after them.
        """
        try:
            return self._render([*history, *end])
        except DataError:
            users = [number for number, message in enumerate(history, start=1) if message["role"] == "user"]
            if not users or users[-1] == len(history):
                raise
            return self._render([*history[: users[-1]], *end])

    def _render(self, messages: Sequence[Message]) -> str:
        options = {"tokenize": False, "add_generation_prompt": not self._template.as_text}
        try:
            return str(apply_template(self._tokenizer, self._template, messages, self._tools, **options))
        except Exception as error:  # templates raise arbitrary exceptions, e.g. for unknown roles
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{self._place}: the chat template rejects the roles {roles} ({error}); correct the messages or use "
                "another template"
            ) from error


@dataclass
class TokenRecord:
    """The tokens of an episode: a prompt, then tokens that the model sampled and tokens that it was given.

    Attributes:
        prompt_ids: tokens of the first prompt.
        token_ids: all later tokens.
        mask: True for each of `token_ids` that the model sampled.
        log_probs: log-prob of each of `token_ids` under the sampling distribution; 0 for given tokens.
        version_runs: the weights that sampled the tokens, as (version, number of tokens); given tokens count for the
            weights of the tokens before them.
        turn_ends: number of `token_ids` at the end of each answer.
    """

    prompt_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    version_runs: list[tuple[int, int]] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)

    @property
    def next_prompt(self) -> tuple[int, ...]:
        """The prompt of the next turn: every token so far."""
        return (*self.prompt_ids, *self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the model sampled."""
        return sum(self.mask)

    def add_answer(
        self, token_ids: Sequence[int], log_probs: Sequence[float], version_runs: Sequence[tuple[int, int]]
    ) -> None:
        """Append an answer of the model, with the log-prob of each token and the weights that sampled them."""
        self._extend(token_ids, log_probs, sampled=True)
        for version, count in version_runs:
            self._count(version, count)
        self.turn_ends.append(len(self.token_ids))

    def add_given(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the model was given after an answer."""
        self._extend(token_ids, [0.0] * len(token_ids), sampled=False)
        if self.version_runs:
            self._count(self.version_runs[-1][0], len(token_ids))

    def _extend(self, token_ids: Sequence[int], log_probs: Sequence[float], *, sampled: bool) -> None:
        self.token_ids.extend(token_ids)
        self.log_probs.extend(log_probs)
        self.mask.extend([sampled] * len(token_ids))

    def _count(self, version: int, count: int) -> None:
        if self.version_runs and self.version_runs[-1][0] == version:
            count += self.version_runs.pop()[1]
        self.version_runs.append((version, count))
