"""Chat templates by name, for models whose tokenizer has none or another than they are to be trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import DataError
from roll_gspo.registry import did_you_mean

NATIVE = "native"
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_KNOWN_ROLES = (
    "{% for m in messages if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('this template has no role ' + m['role']) }}"
    "{% endfor %}"
)


def _chatml(before_content: str = "''") -> str:
    """ChatML; `before_content` is a jinja expression of what stands between the header and the content."""
    return (
        _KNOWN_ROLES + "{% for m in messages %}"
        f"{{{{ '<|im_start|>' + m['role'] + '\n' + {before_content} + m['content'] + '<|im_end|>\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


_CHATML = _chatml()
# Generation goes on from an empty thought, so a finished conversation has one in its last answer.
_EMPTY_THOUGHT = (
    "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' and not add_generation_prompt else '')"
)


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes text.

    Attributes:
        name: as configured.
        source: jinja; None is the tokenizer's own.
        tokens: each has to be one token of the vocabulary.
        end_of_turn: the token with which the assistant ends its answer; None where the tokenizer knows.
        as_text: no markup, so that the tokenizer adds what it adds to any text (e.g. a begin-of-text token).
    """

    name: str
    source: str | None = None
    tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None
    as_text: bool = False


_IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate(NATIVE),
        # The contents alone, a blank line between messages: for base models.
        ChatTemplate("plain", "{{ messages | map(attribute='content') | join('\n\n') }}", as_text=True),
        ChatTemplate("chatml", _CHATML, _IM, _IM[1]),
        # ChatML with Qwen's system message where the conversation has none.
        ChatTemplate(
            "qwen2_5",
            "{% if messages[0]['role'] != 'system' %}"
            f"{{{{ '<|im_start|>system\n{_QWEN_SYSTEM}<|im_end|>\n' }}}}{{% endif %}}" + _CHATML,
            _IM,
            _IM[1],
        ),
        # ChatML whose answer begins after an empty thought: Qwen3 without thinking.
        ChatTemplate(
            "qwen3",
            _chatml(_EMPTY_THOUGHT) + "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
            (*_IM, "<think>", "</think>"),
            _IM[1],
        ),
        ChatTemplate(
            "llama3",
            _KNOWN_ROLES + "{{ bos_token }}{% for m in messages %}"
            "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<|eot_id|>",
        ),
    )
}


def chat_template(name: str) -> ChatTemplate:
    """The template of a name, or of a jinja file.

    Raises:
        DataError: there is no such name or file, or the file is not jinja.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.suffix.startswith(".j"):
        known, hint = ", ".join(TEMPLATES), did_you_mean(name, list(TEMPLATES))
        raise DataError(f"template: unknown '{name}'{hint} (known: {known}; or the path of a .jinja file)")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(
            f"template: {path} cannot be read ({reason}); name a file, or one of {', '.join(TEMPLATES)}"
        ) from error
    _check_jinja(source, path)
    return ChatTemplate(name, source)


def _check_jinja(source: str, path: Path) -> None:
    import jinja2
    from jinja2.ext import loopcontrols

    text = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")  # an extension of transformers
    try:
        jinja2.Environment(extensions=[loopcontrols]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template: {path}:{error.lineno}: not a jinja template ({error.message}); mend it") from error


def check_tokenizer(template: ChatTemplate, tokenizer: Any) -> None:
    """See that the tokenizer knows what the template writes.

    Raises:
        DataError: it has no template of its own, or lacks tokens of this one.
    """
    if template.source is None:
        if tokenizer.chat_template is None:
            named = ", ".join(name for name in TEMPLATES if name != NATIVE)
            raise DataError(
                "the tokenizer has no chat template; set data_args.template to one "
                f"({named}, or a .jinja file), or add chat_template to its tokenizer_config.json"
            )
        return
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in template.tokens if token not in vocabulary]:
        raise DataError(
            f"the chat template {template.name} writes {', '.join(missing)}, no token of this tokenizer; choose the "
            "template of this family of models, or native"
        )
