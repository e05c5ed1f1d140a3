"""Text of conversations and responses: chat templates, with checks that a template renders everything of a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roll_gspo.data.messages import Message
from roll_gspo.data.templates import ChatTemplate, template_problem
from roll_gspo.errors import DataError

Tools = Sequence[Mapping[str, Any]]
# Keys that only link a result to its call. Templates rely on the order of the messages instead.
LINKS = {"tool": ("tool_call_id", "id", "name"), "assistant": ("id",)}


def apply_template(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message], tools: Tools = (), **options: Any
) -> Any:
    """Apply a chat template; `options` are those of `apply_chat_template`."""
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,
        chat_template=template.source,
        **options,
    )


def render(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message], tools: Tools, place: str, *, prompt: bool
) -> str:
    """Render a conversation, and check that the template drops nothing of it.

    Args:
        tokenizer: tokenizer of the model.
        template: chat template.
        messages: conversation.
        tools: schemas of functions.
        place: `file:line`, for error messages.
        prompt: if True, add the header of the answer.

    Raises:
        DataError: the template rejects the conversation, or a message, a key or the tools do not change its text.
    """

    def text(changed: Sequence[Message], tools: Tools) -> str:
        options = {"add_generation_prompt": prompt and not template.as_text, "tokenize": False}
        return str(apply_template(tokenizer, template, changed, tools, **options))

    try:
        rendered = text(messages, tools)
    except Exception as error:  # templates raise arbitrary exceptions, e.g. for unknown roles
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{place}: the chat template rejects the roles {roles} ({error}); correct the row or use another template"
        ) from error
    for what, changed, kept_tools in _without_each_part(messages, tools, rendered):
        try:
            is_lost = text(changed, kept_tools) == rendered
        except Exception:  # the template needs this part, so it reads it
            is_lost = False
        if is_lost:
            raise DataError(
                f"{place}: the chat template does not render {what}; use a template that does, or remove it"
            )
    return rendered


def _without_each_part(
    messages: Sequence[Message], tools: Tools, rendered: str
) -> Iterator[tuple[str, Sequence[Message], Tools]]:
    """Yield (name, messages, tools) without one part each, for all parts that are not obviously in the text."""
    for number, message in enumerate(messages):
        if (content := message["content"].strip()) and content not in rendered:
            changed = [*messages[:number], {**message, "content": ""}, *messages[number + 1 :]]
            yield f"the content of message {number + 1} ({message['role']})", changed, tools
    keys = {key: number for number, m in reversed([*enumerate(messages, start=1)]) for key in _content_keys(m)}
    for key, number in keys.items():
        changed = [{name: value for name, value in m.items() if name != key} for m in messages]
        yield f"'{key}' of message {number} ({messages[number - 1]['role']})", changed, tools
    if tools:
        yield "'tools' of the row", messages, ()


def _content_keys(message: Message) -> Iterator[str]:
    known = ("role", "content", *LINKS.get(message["role"], ()))
    return (key for key in message if key not in known)


def check_tokenizer(template: ChatTemplate, tokenizer: Any) -> None:
    """Check that the tokenizer has the template or its tokens, and that the template renders messages.

    Raises:
        DataError: the tokenizer has no chat template, lacks tokens of `template`, or the template ignores messages.
    """
    problem = template_problem(template, tokenizer.chat_template, tokenizer.get_vocab())
    if problem is not None:
        raise DataError(problem)


def response_text(tokenizer: Any, token_ids: Sequence[int], stop_ids: Sequence[int] = ()) -> str:
    """Return the text of a response for rewards, environments and agents.

    Special tokens such as `<think>` stay. End-of-sequence, padding and `stop_ids` are removed.
    """
    removed = {tokenizer.eos_token_id, tokenizer.pad_token_id, *stop_ids}
    return tokenizer.decode([token for token in token_ids if token not in removed])
