"""Rows to prompts: chat template, system prompt, and a length filter that drops and counts but never cuts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.batch import Prompt
from roll_gspo.data.rows import DataRow
from roll_gspo.data.templates import NATIVE, TEMPLATES, ChatTemplate, chat_template, check_tokenizer
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatFormat:
    """How the conversation of a row is put to the model.

    Attributes:
        template: a name of `TEMPLATES`, or a jinja file.
        tag_templates: of the rows with a tag, instead.
        system_prompt: for conversations without a system message.
        domain_system_prompts: of single domains, instead.
    """

    template: str = NATIVE
    tag_templates: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    domain_system_prompts: Mapping[str, str] = field(default_factory=dict)

    def templates(self) -> dict[str, ChatTemplate]:
        """Every template in use by its name.

        Raises:
            DataError: one does not exist.
        """
        return {name: chat_template(name) for name in (self.template, *self.tag_templates.values())}

    def with_system(self, messages: Sequence[Mapping[str, str]], domain: str) -> Sequence[Mapping[str, str]]:
        """The conversation with its system message."""
        content = self.domain_system_prompts.get(domain, self.system_prompt)
        if content is None or messages[0]["role"] == "system":
            return messages
        return ({"role": "system", "content": content}, *messages)


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template: ChatTemplate = TEMPLATES[NATIVE]
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins."""
    conversation = [dict(m) for m in messages]
    if template.as_text:
        text = tokenizer.apply_chat_template(conversation, chat_template=template.source, tokenize=False)
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    encoded = tokenizer.apply_chat_template(
        conversation, chat_template=template.source, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def end_of_turn_ids(tokenizer: Any, chat: ChatFormat) -> set[int]:
    """The tokens that end an answer by the named templates in use, beside those that the model says itself."""
    ends = {t.end_of_turn for t in chat.templates().values() if t.end_of_turn is not None}
    return {tokenizer.convert_tokens_to_ids(end) for end in ends}


def make_prompts(
    rows: Iterable[DataRow],
    tokenizer: Any,
    prompt_length: int,
    where: str,
    chat: ChatFormat | None = None,
    domains: Sequence[str] | None = None,
) -> tuple[Prompt, ...]:
    """Apply the chat template and drop prompts of more than `prompt_length` tokens, with a warning that counts them.

    Args:
        where: what the rows are called in errors and warnings.
        chat: template and system prompts; None: the tokenizer's template, and none.
        domains: whose reward judges each row; None: the `domain` column.

    Raises:
        DataError: a template does not exist, does not fit the tokenizer or refuses a row; or no prompt is short enough.
    """
    chat = chat or ChatFormat()
    rows = list(rows)
    domains = [row.domain for row in rows] if domains is None else domains
    templates = checked_templates(chat, tokenizer, where)
    kept: list[Prompt] = []
    dropped: list[int] = []
    lost: Counter[str] = Counter()
    for row, domain in zip(rows, domains, strict=True):
        template = templates[chat.tag_templates.get(row.tag, chat.template)]
        token_ids = _encoded(row, chat.with_system(row.messages, domain), tokenizer, template, where)
        if len(token_ids) > prompt_length:
            dropped.append(len(token_ids))
            lost[domain] += 1
            continue
        columns = {
            **row.extra,
            "id": row.id,
            "ground_truth": row.ground_truth,
            "domain": row.domain,
            "tag": row.tag,
        }
        kept.append(Prompt(tuple(token_ids), tokenizer.decode(token_ids), columns))
    if not kept:
        raise DataError(
            f"{where}: every prompt is longer than prompt_length {prompt_length} (shortest {min(dropped)}, longest "
            f"{max(dropped)} tokens); raise prompt_length"
            if dropped
            else f"{where}: there is no row left; give at least one"
        )
    if dropped:
        logger.warning(
            "%s: %d of %d prompts are longer than prompt_length %d (longest %d tokens) and are left out%s",
            where,
            len(dropped),
            len(rows),
            prompt_length,
            max(dropped),
            _by_domain(lost, Counter(domains)),
        )
    return tuple(kept)


def checked_templates(chat: ChatFormat, tokenizer: Any, where: str) -> dict[str, ChatTemplate]:
    """Every template in use by its name.

    Raises:
        DataError: one does not exist, or does not fit the tokenizer.
    """
    try:
        templates = chat.templates()
        for template in templates.values():
            check_tokenizer(template, tokenizer)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return templates


def _encoded(
    row: DataRow, messages: Sequence[Mapping[str, str]], tokenizer: Any, template: ChatTemplate, where: str
) -> list[int]:
    try:
        return encode_chat(tokenizer, messages, template)
    except Exception as error:  # what a template raises is up to its author, e.g. for a role it does not take
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{where}: row '{row.id}': the chat template refuses {roles} ({error})") from error


def _by_domain(lost: Counter[str], all_rows: Counter[str]) -> str:
    if len(all_rows) < 2:
        return ""
    return ": " + ", ".join(f"{count} of {all_rows[name]} of {name or 'no domain'}" for name, count in lost.items())
