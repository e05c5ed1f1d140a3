"""Chat rows to what supervised fine-tuning imitates: token ids, and which of them an assistant wrote."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.data import column_addition
from roll_gspo.data.files import Item, shown
from roll_gspo.data.prompts import ChatFormat, checked_templates
from roll_gspo.data.rows import Columns, Problem, Reading, columns_of, read_each, take_messages, text_of
from roll_gspo.data.templates import ChatTemplate
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)
RESPONSES = ("response", "completion", "answer")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = tuple[dict[str, str], ...]
Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        place: `file:line`, for the errors.
        messages: {role, content}; the last one is the assistant's, and other ones may be.
        tag: which chat template it has; empty where the row does not say.
    """

    place: str
    messages: Messages
    tag: str = ""


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


def read_conversations(
    file_names: Sequence[str], where: str, on_bad_row: str = "error", reading: Reading | None = None
) -> list[Conversation]:
    """Read rows of `messages` with assistant turns, or of a prompt and a response, from files as in `read_rows`.

    A prompt is `prompt`, `question`, or `messages` that end with the user's; a response `response`, `completion` or
    `answer`.

    Raises:
        DataError: a file is missing or empty, or a row is malformed: with file and line.
    """
    known = reading or Reading()

    def parse(item: Item, _: str) -> tuple[Conversation | None, tuple[Problem, ...]]:
        found = _conversation(item, known.columns)
        return (found, ()) if isinstance(found, Conversation) else (None, (found,))

    return read_each(file_names, where, on_bad_row, known, parse)


def generate_conversations(num_rows: int, seed: int, split: str) -> list[Conversation]:
    """`builtin:column_addition` with the working of each sum, without a slip; see `column_addition.rows`."""
    chance, found = random.Random(seed), []
    for row in column_addition.rows(num_rows, seed, split):
        a, _, b = row.id.partition("+")
        answer = {"role": "assistant", "content": column_addition.work_out(int(a), int(b), chance)}
        found.append(Conversation(f"{column_addition.FILE_NAME}: {row.id}", (*row.messages, answer)))
    return found


def _conversation(item: Item, columns: Columns) -> Conversation | Problem:
    rest = columns_of(item.value)
    if isinstance(rest, Problem):
        return rest
    found = ", ".join(rest)
    # Tool calls and the like would be lost without a word: what cannot be rendered is no demonstration.
    messages, problems = take_messages(rest, columns, found, nothing_lost=True)
    if problems:
        return problems[0]
    if messages[-1]["role"] != "assistant":
        name = next((name for name in RESPONSES if rest.get(name) is not None), None)
        if name is not None:
            if not isinstance(rest[name], str):
                return Problem("no response", f"{name} must be a text, got {shown(rest[name])}", "write a text")
            messages = (*messages, {"role": "assistant", "content": rest[name]})
    turns = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not turns:
        expected = f"expected messages with an assistant's turn, or {', '.join(RESPONSES)} beside the prompt"
        return Problem("nothing to imitate", f"nothing to imitate: {expected}, found {found}", "add a response")
    if turns[0] == 1:
        detail = "message 1 is the assistant's, and there is nothing that it answers"
        return Problem("an answer to nothing", detail, "put what it answers before it")
    if empty := [number for number in turns if not messages[number - 1]["content"]]:
        return Problem("an empty answer", f"message {empty[0]}, the assistant's, is empty", "write something")
    return Conversation(item.place, messages[: turns[-1]], text_of(rest.get(columns.tag)))


def make_samples(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    sequence_length: int,
    where: str,
    chat: ChatFormat | None = None,
    *,
    separate_turns: bool = False,
) -> ChatSamples:
    """Apply the chat template, find the assistant's tokens, and drop sequences of more than `sequence_length` tokens.

    Args:
        conversations: rows.
        tokenizer: of the model.
        sequence_length: the longest sequence in tokens; longer ones are dropped and counted, never cut.
        where: the files, for the errors.
        chat: templates, and what is put before conversations without a system message; None: the tokenizer's, nothing.
        separate_turns: a sequence for each assistant's turn with all that comes before it, in place of one sequence in
            which all of its turns are imitated.

    Raises:
        DataError: a template that does not exist, does not fit the tokenizer, refuses a row, or renders the beginning
            of a conversation otherwise than the whole: with the row; or no sequence is short enough.
    """
    chat = chat or ChatFormat()
    renderers = {name: _Renderer(tokenizer, t) for name, t in checked_templates(chat, tokenizer, where).items()}
    kept, dropped, ends = [], [], set()
    for row, conversation in enumerate(conversations):
        renderer = renderers[chat.tag_templates.get(conversation.tag, chat.template)]
        messages = chat.with_system(conversation.messages, "")
        for part in _parts(messages) if separate_turns else [messages]:
            token_ids, spans = renderer.find(part, conversation.place, separate_turns)
            ends |= {token_ids[end - 1] for _, end in spans} & renderer.special
            sample = _sample(row, token_ids, spans, conversation.place)
            if len(sample) > sequence_length:
                dropped.append(len(sample))
            else:
                kept.append(sample)
    _report_lengths(where, sequence_length, len(kept), dropped)
    return ChatSamples(tuple(kept), len(dropped), frozenset(ends))


def _parts(messages: Turns) -> list[Turns]:
    return [messages[: number + 1] for number, message in enumerate(messages) if message["role"] == "assistant"]


def _sample(row: int, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], place: str) -> ChatSample:
    first, last = spans[0][0], spans[-1][1]
    if first == 0:
        raise DataError(f"{place}: the chat template puts nothing before the assistant's first token")
    mask = [False] * (last - first)
    for start, end in spans:
        mask[start - first : end - first] = [True] * (end - start)
    return ChatSample(row, tuple(token_ids[:first]), tuple(token_ids[first:last]), tuple(mask))


class _Renderer:
    """One chat template at work.

    Attributes:
        special: tokens that are markup.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._has_marks = GENERATION_MARK.search(str(template.source or tokenizer.chat_template)) is not None
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if template.end_of_turn is not None:
            self.special.add(tokenizer.convert_tokens_to_ids(template.end_of_turn))

    def find(self, messages: Turns, place: str, last_only: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and (begin, end) of what is imitated of every assistant's turn, or of the last one only."""
        find = self._by_marks if self._has_marks else self._by_prefixes
        token_ids, spans = find(messages, place, last_only)
        return token_ids, [(start, self._without_trailing(token_ids, start, end)) for start, end in spans]

    def _by_prefixes(self, messages: Turns, place: str, last_only: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """A turn is from where the conversation before it ends to where it ends with it."""
        whole, spans, last = self._encode(messages, place), [], len(messages) - 1
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number in [last] if last_only else turns:
            before = self._encode(messages[:number], place, add_generation_prompt=True)
            until = whole if number == last else self._encode(messages[: number + 1], place)
            if whole[: len(before)] != before or whole[: len(until)] != until or len(until) <= len(before):
                raise DataError(
                    f"{place}: the chat template renders the conversation up to messages[{number}] otherwise than at "
                    "the beginning of the whole, so that the tokens of this turn cannot be told; set "
                    "data_args.multi_turn: separate, or mark them in the template with {% generation %}"
                )
            spans.append((len(before), len(until)))
        return whole, spans

    def _by_marks(self, messages: Turns, place: str, last_only: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Turns are the runs of tokens that the template itself marks as generated."""
        encoded = self._apply(messages, place, return_assistant_tokens_mask=True)
        token_ids, marks = list(encoded["input_ids"]), [0, *encoded["assistant_masks"], 0]
        edges = [place for place in range(len(marks) - 1) if bool(marks[place]) != bool(marks[place + 1])]
        if not edges:
            raise DataError(f"{place}: the chat template marks no token of this row with {{% generation %}}; mend it")
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        return token_ids, spans[-1:] if last_only else spans

    def _without_trailing(self, token_ids: list[int], start: int, end: int) -> int:
        """The end of a turn: after its last special token, where only white space follows, which nobody generates."""
        last = next((place for place in range(end - 1, start - 1, -1) if token_ids[place] in self.special), None)
        if last is None or self._tokenizer.decode(token_ids[last + 1 : end]).strip():
            return end
        return last + 1

    def _encode(self, messages: Turns, place: str, add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(messages, place, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _apply(self, messages: Turns, place: str, **options: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                chat_template=self._template.source,
                tokenize=True,
                return_dict=True,
                **options,
            )
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
