"""Rows to prompts: the tokenizer's chat template, and a length filter that drops and counts but never cuts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.batch import Prompt
from roll_gspo.data.rows import DataRow
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins."""
    encoded = tokenizer.apply_chat_template(
        [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def make_prompts(
    rows: Iterable[DataRow], tokenizer: Any, prompt_length: int, where: str, system_prompt: str | None = None
) -> tuple[Prompt, ...]:
    """Apply the chat template and drop prompts of more than `prompt_length` tokens, with a warning that counts them.

    Raises:
        DataError: the tokenizer has no chat template, or no prompt is short enough.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: the tokenizer has no chat template; add chat_template to its tokenizer_config.json")
    kept: list[Prompt] = []
    dropped: list[int] = []
    for row in rows:
        messages = row.messages
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system_prompt}, *messages)
        try:
            token_ids = encode_chat(tokenizer, messages)
        except Exception as error:  # what a template raises is up to its author, e.g. for a role it does not take
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"{where}: row '{row.id}': the chat template refuses {roles} ({error})") from error
        if len(token_ids) > prompt_length:
            dropped.append(len(token_ids))
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
        )
    if dropped:
        logger.warning(
            "%s: %d of %d prompts are longer than prompt_length %d (longest %d tokens) and are left out",
            where,
            len(dropped),
            len(dropped) + len(kept),
            prompt_length,
            max(dropped),
        )
    return tuple(kept)
