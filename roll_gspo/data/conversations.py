"""Conversations for supervised fine-tuning: token ids, and the mask of the tokens that the assistant wrote."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.data import column_addition
from roll_gspo.data.files import RawRow, abbreviate
from roll_gspo.data.messages import Columns, Message, Problem, parse_messages, pop_messages, read_tools, take
from roll_gspo.data.prompts import load_templates
from roll_gspo.data.rendering import Tools, apply_template, render
from roll_gspo.data.rows import ReadOptions, as_text, read_parsed, row_columns
from roll_gspo.data.templates import ChatFormat, ChatTemplate
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)
RESPONSE_COLUMNS = ("response", "completion", "answer")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
LABELS = ("id", "domain", "source")  # columns that describe a row and are not part of its conversation

Turns = Sequence[Message]


@dataclass(frozen=True)
class Conversation:
    """One row with at least one answer of the assistant.

    Attributes:
        place: `file:line`, for error messages.
        messages: messages ({role, content, ...}); the last one is from the assistant.
        tag: label that selects the chat template; empty if the row has none.
        tools: schemas of the functions that the model may call.
    """

    place: str
    messages: tuple[Message, ...]
    tag: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ChatSample:
    """One sequence to train on.

    Attributes:
        row: index of the conversation.
        prompt_ids: tokens before the first token in the loss, at least one.
        response_ids: tokens from the first to the last one in the loss.
        mask: True for each token of `response_ids` that is in the loss.
    """

    row: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class ChatSamples:
    """Tokenized conversations.

    Attributes:
        samples: samples that are short enough.
        num_dropped: number of samples that are too long.
        end_token_ids: special tokens at the end of assistant turns; empty if the template has none.
    """

    samples: tuple[ChatSample, ...]
    num_dropped: int
    end_token_ids: frozenset[int]


def read_conversations(
    file_names: Sequence[str], key: str, on_bad_row: str = "error", options: ReadOptions | None = None
) -> list[Conversation]:
    """Read conversations: `messages` with assistant turns, or a prompt and a response.

    The prompt is the column `prompt` or `question`, or `messages` that end with a user message. The response is the
    column `response`, `completion` or `answer`. A warning names the columns that are not read.

    Args:
        file_names, key, on_bad_row, options: see `read_rows`.

    Raises:
        DataError: a file is missing or empty, or a row is malformed; the message has file and line.
    """
    read_options, unread = options or ReadOptions(), Counter[str]()

    def parse(item: RawRow, _: str) -> tuple[Conversation | None, tuple[Problem, ...]]:
        parsed = _parse_conversation(item, read_options.columns, unread)
        return (parsed, ()) if isinstance(parsed, Conversation) else (None, (parsed,))

    conversations = read_parsed(file_names, key, on_bad_row, read_options, parse)
    if unread:
        listed = ", ".join(f"{name} ({count} rows)" for name, count in unread.items())
        logger.warning("%s: columns that are not part of a conversation are not read: %s", key, listed)
    return conversations


def generate_conversations(num_rows: int, seed: int, split: str) -> list[Conversation]:
    """Generate conversations of `builtin:column_addition` with correct answers; see `column_addition.rows`."""
    rng, conversations = random.Random(seed), []
    for row in column_addition.rows(num_rows, seed, split):
        a, _, b = row.id.partition("+")
        answer = {"role": "assistant", "content": column_addition.worked_answer(int(a), int(b), rng)}
        conversations.append(Conversation(f"{column_addition.FILE_NAME}: {row.id}", (*row.messages, answer)))
    return conversations


def _parse_conversation(item: RawRow, columns: Columns, unread: Counter[str]) -> Conversation | Problem:
    """Return the conversation of a row, and count the columns that are not read."""
    rest = row_columns(item.value)
    if isinstance(rest, Problem):
        return rest
    found = ", ".join(rest)
    messages, problems = pop_messages(rest, columns, found)
    if problems:
        return problems[0]
    if messages[-1]["role"] != "assistant":
        response = _pop_response(rest)
        if isinstance(response, Problem):
            return response
        messages = (*messages, *response)
    tools = read_tools(rest)
    if isinstance(tools, Problem):
        return tools
    turns = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not turns:
        expected = f"expected an assistant message, or a column {', '.join(RESPONSE_COLUMNS)}"
        return Problem("no response", f"no response: {expected}, found {found}", "add a response")
    if turns[0] == 1:
        detail = "message 1 is from the assistant, so there is no prompt before it"
        return Problem("no prompt before the response", detail, "add a user message before it")
    if empty := [number for number in turns if not messages[number - 1]["content"] and len(messages[number - 1]) == 2]:
        return Problem("empty response", f"message {empty[0]} is from the assistant and empty", "add its content")
    tag = as_text(take(rest, columns.tag))
    unread.update(name for name, value in rest.items() if value is not None and name not in (*LABELS, "tools"))
    return Conversation(item.place, messages[: turns[-1]], tag, tools)


def _pop_response(rest: dict[str, Any]) -> tuple[Message, ...] | Problem:
    """Remove and return the messages of the response column; none if there is no such column."""
    name = next((name for name in RESPONSE_COLUMNS if rest.get(name) is not None), None)
    if name is None:
        return ()
    value = rest.pop(name)
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif not isinstance(value, list):
        detail = f"{name} must be a string or a list of messages, got {abbreviate(value)}"
        return Problem("response: not a string", detail, "write a string")
    messages, problems = parse_messages(value)
    return problems[0] if problems else messages


def make_samples(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    sequence_length: int,
    key: str,
    chat: ChatFormat | None = None,
    *,
    separate_turns: bool = False,
) -> ChatSamples:
    """Apply the chat template, find the tokens of the assistant, and drop sequences that are too long.

    Args:
        conversations: conversations to tokenize.
        tokenizer: tokenizer of the model.
        sequence_length: maximum number of tokens; longer sequences are dropped and counted.
        key: YAML key of the files, for errors and warnings.
        chat: templates and system prompts; None for the template of the tokenizer and no system prompt.
        separate_turns: if True, each assistant turn becomes a sequence with all messages before it. Otherwise a
            conversation is one sequence with all assistant turns in the loss.

    Raises:
        DataError: a template does not exist, does not fit the tokenizer, rejects a row, or does not render a prefix of
            the conversation as a prefix of the text; or no sequence is short enough.
    """
    chat = chat or ChatFormat()
    encoders = {name: _TurnEncoder(tokenizer, t) for name, t in load_templates(chat, tokenizer, key).items()}
    kept, dropped, ends = [], [], set()
    for row, conversation in enumerate(conversations):
        encoder = encoders[chat.tag_templates.get(conversation.tag, chat.template)]
        messages = chat.with_system(conversation.messages, "")
        encoder.check(messages, conversation)
        for part in _prefixes(messages) if separate_turns else [messages]:
            token_ids, spans = encoder.encode(part, conversation, separate_turns)
            ends |= {token_ids[end - 1] for _, end in spans} & encoder.special_ids
            sample = _make_sample(row, token_ids, spans, conversation.place)
            if len(sample) > sequence_length:
                dropped.append(len(sample))
            else:
                kept.append(sample)
    _report_lengths(key, sequence_length, len(kept), dropped)
    return ChatSamples(tuple(kept), len(dropped), frozenset(ends))


def _prefixes(messages: Turns) -> list[Turns]:
    """Return the messages up to each assistant turn."""
    return [messages[: number + 1] for number, message in enumerate(messages) if message["role"] == "assistant"]


def _make_sample(row: int, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], place: str) -> ChatSample:
    first, last = spans[0][0], spans[-1][1]
    if first == 0:
        raise DataError(
            f"{place}: the chat template renders no token before the first token of the assistant; use another template"
        )
    mask = [False] * (last - first)
    for start, end in spans:
        mask[start - first : end - first] = [True] * (end - start)
    return ChatSample(row, tuple(token_ids[:first]), tuple(token_ids[first:last]), tuple(mask))


class _TurnEncoder:
    """Applies a chat template and finds the tokens of assistant turns.

    Attributes:
        special_ids: ids of special tokens.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if template.end_of_turn is not None:
            self.special_ids.add(tokenizer.convert_tokens_to_ids(template.end_of_turn))

    def check(self, messages: Turns, row: Conversation) -> None:
        """Check that the template renders everything of the conversation.

        Raises:
            DataError: the template rejects the conversation, or drops a part of it.
        """
        render(self._tokenizer, self._template, messages, row.tools, row.place, prompt=False)

    def encode(self, messages: Turns, row: Conversation, last_only: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return (token ids, spans), where a span is (start, end) of the tokens in the loss of an assistant turn.

        Args:
            messages: the conversation or the start of it, with its system prompt.
            row: the row, for its tools and error messages.
            last_only: if True, only the span of the last turn is returned.
        """
        find_turns = self._turns_by_tags if self._has_generation_tags(row.tools) else self._turns_by_prefixes
        token_ids, spans = find_turns(messages, row, last_only)
        return token_ids, [(start, self._strip_trailing(token_ids, start, end)) for start, end in spans]

    def _has_generation_tags(self, tools: Tools) -> bool:
        source = self._template.source or self._tokenizer.get_chat_template(tools=list(tools) or None)
        return GENERATION_TAG.search(source) is not None

    def _turns_by_prefixes(
        self, messages: Turns, row: Conversation, last_only: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Find each turn by encoding the conversation up to and including it."""
        whole, spans, last = self._encode(messages, row), [], len(messages) - 1
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number in [last] if last_only else turns:
            before = self._encode(messages[:number], row, add_generation_prompt=True)
            until = whole if number == last else self._encode(messages[: number + 1], row)
            if whole[: len(before)] != before or whole[: len(until)] != until or len(until) <= len(before):
                raise DataError(
                    f"{row.place}: the chat template renders the conversation up to messages[{number}] differently "
                    "than as a prefix of the whole, so the tokens of this turn cannot be located; set "
                    "data_args.multi_turn: separate, or mark them in the template with {% generation %}"
                )
            spans.append((len(before), len(until)))
        return whole, spans

    def _turns_by_tags(
        self, messages: Turns, row: Conversation, last_only: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Find the turns by the `generation` tags of the template."""
        encoded = self._apply(messages, row, return_assistant_tokens_mask=True)
        token_ids, mask = list(encoded["input_ids"]), [0, *encoded["assistant_masks"], 0]
        edges = [position for position in range(len(mask) - 1) if bool(mask[position]) != bool(mask[position + 1])]
        if not edges:
            raise DataError(
                f"{row.place}: the chat template marks no token of this row with {{% generation %}}; correct the "
                "template"
            )
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        return token_ids, spans[-1:] if last_only else spans

    def _strip_trailing(self, token_ids: list[int], start: int, end: int) -> int:
        """Return the end of a turn without whitespace after its last special token, which is never generated."""
        last = next((index for index in range(end - 1, start - 1, -1) if token_ids[index] in self.special_ids), None)
        if last is None or self._tokenizer.decode(token_ids[last + 1 : end]).strip():
            return end
        return last + 1

    def _encode(self, messages: Turns, row: Conversation, add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(messages, row, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _apply(self, messages: Turns, row: Conversation, **options: bool) -> Any:
        try:
            return apply_template(
                self._tokenizer, self._template, messages, row.tools, tokenize=True, return_dict=True, **options
            )
        except Exception as error:  # templates raise arbitrary exceptions, e.g. for unknown roles
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                f"{row.place}: the chat template rejects the roles {roles} ({error}); correct the row or use another "
                "template"
            ) from error


def _report_lengths(key: str, sequence_length: int, num_kept: int, dropped: Sequence[int]) -> None:
    if not num_kept:
        raise DataError(
            f"{key}: every sequence is longer than sequence_length {sequence_length} (shortest {min(dropped)}, "
            f"longest {max(dropped)} tokens); raise sequence_length"
        )
    if dropped:
        logger.warning(
            "%s: dropped %d of %d sequences that are longer than sequence_length %d (longest %d tokens)",
            key,
            len(dropped),
            len(dropped) + num_kept,
            sequence_length,
            max(dropped),
        )
