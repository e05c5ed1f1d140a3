"""Chat rows to what supervised fine-tuning imitates: token ids, and which of them an assistant wrote."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from roll_gspo.data import column_addition
from roll_gspo.data.rows import columns_of, read_each, take_messages
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)
RESPONSES = ("response", "completion", "answer")
MESSAGE_KEYS = ("role", "content")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        place: `file:line`, for the errors.
        messages: {role, content}; the last one is the assistant's, and other ones may be.
    """

    place: str
    messages: Messages


@dataclass(frozen=True)
class ChatSample:
    """One sequence to train on.

    Attributes:
        row: its conversation, counted from 0 in the order of reading.
        prompt_ids: the tokens before the first one to imitate; at least one.
        rest_ids: the tokens from there to the last one to imitate.
        mask: true on those of `rest_ids` that are to be imitated.
    """

    row: int
    prompt_ids: tuple[int, ...]
    rest_ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.rest_ids)


@dataclass(frozen=True)
class ChatSamples:
    """What became of the conversations.

    Attributes:
        samples: those that are short enough.
        num_dropped: those that are not.
        end_token_ids: the tokens that end assistant turns; empty where the template ends them with none.
    """

    samples: tuple[ChatSample, ...]
    num_dropped: int
    end_token_ids: frozenset[int]


def read_conversations(file_names: Sequence[str], where: str, on_bad_row: str = "error") -> list[Conversation]:
    """Read rows of `messages` with assistant turns, or of a prompt and a response, from files as in `read_rows`.

    A prompt is `prompt`, `question`, or `messages` that end with the user's; a response `response`, `completion` or
    `answer`.

    Raises:
        DataError: a file is missing or empty, or a row is malformed: with file and line.
    """
    return read_each(file_names, where, on_bad_row, _conversation)


def generate_conversations(num_rows: int, seed: int, split: str) -> list[Conversation]:
    """`builtin:column_addition` with the working of each sum, without a slip; see `column_addition.rows`."""
    chance, found = random.Random(seed), []
    for row in column_addition.rows(num_rows, seed, split):
        a, _, b = row.id.partition("+")
        answer = {"role": "assistant", "content": column_addition.work_out(int(a), int(b), chance)}
        found.append(Conversation(f"{column_addition.FILE_NAME}: {row.id}", (*row.messages, answer)))
    return found


def _conversation(value: Any, place: str) -> Conversation:
    columns = columns_of(value, place)
    if isinstance(columns.get("messages"), str):  # ROLL's files hold the list as a JSON string
        with suppress(ValueError):  # what is wrong with it, `take_messages` says
            columns["messages"] = json.loads(columns["messages"])
    _refuse_other_keys(columns.get("messages"), place)
    found = ", ".join(columns)
    messages = take_messages(columns, place)
    if messages[-1]["role"] != "assistant":
        name = next((name for name in RESPONSES if columns.get(name) is not None), None)
        if name is not None:
            if not isinstance(columns[name], str):
                raise DataError(f"{place}: {name} must be a text, got {columns[name]!r:.80}")
            messages = (*messages, {"role": "assistant", "content": columns[name]})
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"{place}: nothing to imitate: expected messages with an assistant's turn, or {', '.join(RESPONSES)} "
            f"beside the prompt, found {found}"
        )
    if turns[0] == 0:
        raise DataError(f"{place}: messages[0] is the assistant's, and there is nothing that it answers")
    if empty := [number for number in turns if not messages[number]["content"]]:
        raise DataError(f"{place}: messages[{empty[0]}], the assistant's, is empty")
    return Conversation(place, messages[: turns[-1] + 1])


def _refuse_other_keys(messages: Any, place: str) -> None:
    """Tool calls and the like would be lost without a word: what cannot be rendered is no demonstration."""
    if not isinstance(messages, list):
        return
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        if others := [key for key, value in message.items() if key not in MESSAGE_KEYS and value is not None]:
            raise DataError(
                f"{place}: messages[{number}] has {', '.join(others)}, which would be lost: only role and content are "
                "trained on; write them into the content"
            )


def make_samples(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    sequence_length: int,
    where: str,
    *,
    system_prompt: str | None = None,
    separate_turns: bool = False,
) -> ChatSamples:
    """Apply the chat template, find the assistant's tokens, and drop sequences of more than `sequence_length` tokens.

    Args:
        conversations: rows.
        tokenizer: with a chat template.
        sequence_length: the longest sequence in tokens; longer ones are dropped and counted, never cut.
        where: the files, for the errors.
        system_prompt: put before conversations that have none.
        separate_turns: a sequence for each assistant's turn with all that comes before it, in place of one sequence in
            which all of its turns are imitated.

    Raises:
        DataError: no chat template, or one that refuses a row or renders the beginning of a conversation otherwise than
            the whole: with the row; or no sequence is short enough.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: the tokenizer has no chat template; add chat_template to its tokenizer_config.json")
    find = _by_marks if GENERATION_MARK.search(str(tokenizer.chat_template)) else _by_prefixes
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept, dropped, ends = [], [], set()
    for row, conversation in enumerate(conversations):
        messages = conversation.messages
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system_prompt}, *messages)
        for part in _parts(messages) if separate_turns else [messages]:
            token_ids, spans = find(tokenizer, part, conversation.place, separate_turns)
            spans = [(start, _without_trailing(tokenizer, token_ids, start, end, special)) for start, end in spans]
            ends |= {token_ids[end - 1] for _, end in spans} & special
            sample = _sample(row, token_ids, spans, conversation.place)
            if len(sample) > sequence_length:
                dropped.append(len(sample))
            else:
                kept.append(sample)
    _report_lengths(where, sequence_length, len(kept), dropped)
    return ChatSamples(tuple(kept), len(dropped), frozenset(ends))


def _parts(messages: Messages) -> list[Messages]:
    return [messages[: number + 1] for number, message in enumerate(messages) if message["role"] == "assistant"]


def _sample(row: int, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], place: str) -> ChatSample:
    first, last = spans[0][0], spans[-1][1]
    if first == 0:
        raise DataError(f"{place}: the chat template puts nothing before the assistant's first token")
    mask = [False] * (last - first)
    for start, end in spans:
        mask[start - first : end - first] = [True] * (end - start)
    return ChatSample(row, tuple(token_ids[:first]), tuple(token_ids[first:last]), tuple(mask))


def _by_prefixes(
    tokenizer: Any, messages: Messages, place: str, last_only: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, and (begin, end) of each assistant's turn: where the conversation before it, and with it, end."""
    whole, spans, last = _encode(tokenizer, messages, place), [], len(messages) - 1
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in [last] if last_only else turns:
        before = _encode(tokenizer, messages[:number], place, add_generation_prompt=True)
        until = whole if number == last else _encode(tokenizer, messages[: number + 1], place)
        if whole[: len(before)] != before or whole[: len(until)] != until or len(until) <= len(before):
            raise DataError(
                f"{place}: the chat template renders the conversation up to messages[{number}] otherwise than at the "
                "beginning of the whole, so that the tokens of this turn cannot be told; set data_args.multi_turn: "
                "separate, or mark them in the template with {% generation %}"
            )
        spans.append((len(before), len(until)))
    return whole, spans


def _by_marks(
    tokenizer: Any, messages: Messages, place: str, last_only: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, and the runs of them that the template itself marks as generated."""
    encoded = _apply(tokenizer, messages, place, return_assistant_tokens_mask=True)
    token_ids, marks = list(encoded["input_ids"]), [0, *encoded["assistant_masks"], 0]
    edges = [place for place in range(len(marks) - 1) if bool(marks[place]) != bool(marks[place + 1])]
    if not edges:
        raise DataError(f"{place}: the chat template marks no token of this row with {{% generation %}}; mend it")
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return token_ids, spans[-1:] if last_only else spans


def _without_trailing(tokenizer: Any, token_ids: list[int], start: int, end: int, special: set[int]) -> int:
    """The end of a turn: after its last special token, where only white space follows, which is never generated."""
    last = next((place for place in range(end - 1, start - 1, -1) if token_ids[place] in special), None)
    if last is None or tokenizer.decode(token_ids[last + 1 : end]).strip():
        return end
    return last + 1


def _encode(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], place: str, add_generation_prompt: bool = False
) -> list[int]:
    return list(_apply(tokenizer, messages, place, add_generation_prompt=add_generation_prompt)["input_ids"])


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, str]], place: str, **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=True, return_dict=True, **options)
    except Exception as error:  # what a template raises is up to its author, e.g. for a role it does not take
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{place}: the chat template refuses {roles} ({error})") from error


def _report_lengths(where: str, sequence_length: int, num_kept: int, dropped: Sequence[int]) -> None:
    if not num_kept:
        raise DataError(
            f"{where}: every sequence is longer than sequence_length {sequence_length} (shortest {min(dropped)}, "
            f"longest {max(dropped)} tokens); raise sequence_length"
        )
    if dropped:
        logger.warning(
            "%s: %d of %d sequences are longer than sequence_length %d (longest %d tokens) and are left out",
            where,
            len(dropped),
            len(dropped) + num_kept,
            sequence_length,
            max(dropped),
        )
