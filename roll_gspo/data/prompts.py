"""Conversion of rows to prompts: chat template, system prompt, and a filter that drops long prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from roll_gspo.batch import Prompt
from roll_gspo.data.messages import Message
from roll_gspo.data.rendering import Tools, check_tokenizer, render
from roll_gspo.data.rows import DataRow
from roll_gspo.data.templates import NATIVE, TEMPLATES, ChatFormat, ChatTemplate
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    template: ChatTemplate = TEMPLATES[NATIVE],
    tools: Tools = (),
    place: str = "prompt",
) -> list[int]:
    """Return the token ids of a conversation, including the generation prompt.

    Args:
        tokenizer: tokenizer of the model.
        messages: conversation.
        template: chat template.
        tools: schemas of the functions that the model may call.
        place: `file:line`, for error messages.

    Raises:
        DataError: the template rejects the conversation, or drops a part of it.
    """
    text = render(tokenizer, template, messages, tools, place, prompt=True)
    ids = list(tokenizer(text, add_special_tokens=template.as_text)["input_ids"])
    if template.as_text and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1]
    return ids


def end_of_turn_ids(tokenizer: Any, chat: ChatFormat) -> set[int]:
    """Return the end-of-turn tokens of the named templates in use; the model configuration may have others."""
    ends = {t.end_of_turn for t in chat.templates().values() if t.end_of_turn is not None}
    return {tokenizer.convert_tokens_to_ids(end) for end in ends}


def make_prompts(
    rows: Iterable[DataRow],
    tokenizer: Any,
    prompt_length: int,
    key: str,
    chat: ChatFormat | None = None,
    domains: Sequence[str] | None = None,
) -> tuple[Prompt, ...]:
    """Apply the chat template, and drop prompts that are longer than `prompt_length` tokens with a warning.

    Args:
        rows: rows to convert.
        tokenizer: tokenizer of the model.
        prompt_length: maximum number of tokens.
        key: YAML key of the rows, for errors and warnings.
        chat: templates and system prompts; None for the template of the tokenizer and no system prompt.
        domains: reward domain of each row; None for the column `domain`.

    Raises:
        DataError: a template does not exist, does not fit the tokenizer or rejects a row, or no prompt is short enough.
    """
    chat = chat or ChatFormat()
    rows = list(rows)
    domains = [row.domain for row in rows] if domains is None else domains
    templates = load_templates(chat, tokenizer, key)
    kept: list[Prompt] = []
    dropped: list[int] = []
    dropped_by_domain: Counter[str] = Counter()
    for row, domain in zip(rows, domains, strict=True):
        template = templates[chat.tag_templates.get(row.tag, chat.template)]
        messages = chat.with_system(row.messages, domain)
        token_ids = encode_chat(tokenizer, messages, template, row.tools, row.place or f"{key}: row {row.id!r}")
        if len(token_ids) > prompt_length:
            dropped.append(len(token_ids))
            dropped_by_domain[domain] += 1
            continue
        kept.append(Prompt(tuple(token_ids), tokenizer.decode(token_ids), row.columns))
    if not kept:
        raise DataError(
            f"{key}: every prompt is longer than prompt_length {prompt_length} (shortest {min(dropped)}, longest "
            f"{max(dropped)} tokens); raise prompt_length"
            if dropped
            else f"{key}: there are no rows; add at least one"
        )
    if dropped:
        logger.warning(
            "%s: dropped %d of %d prompts that are longer than prompt_length %d (longest %d tokens)%s",
            key,
            len(dropped),
            len(rows),
            prompt_length,
            max(dropped),
            _domain_counts(dropped_by_domain, Counter(domains)),
        )
    return tuple(kept)


def load_templates(chat: ChatFormat, tokenizer: Any, key: str) -> dict[str, ChatTemplate]:
    """Return all templates in use by name, after checking them.

    Args:
        chat: templates and system prompts.
        tokenizer: tokenizer of the model.
        key: YAML key of the rows, for error messages.

    Raises:
        DataError: a template does not exist, or does not fit the tokenizer.
    """
    try:
        templates = chat.templates()
        for template in templates.values():
            check_tokenizer(template, tokenizer)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return templates


def _domain_counts(dropped: Counter[str], all_rows: Counter[str]) -> str:
    if len(all_rows) < 2:
        return ""
    return ": " + ", ".join(f"{name or 'no domain'} {count} of {all_rows[name]}" for name, count in dropped.items())
