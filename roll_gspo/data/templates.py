"""Named chat templates, for tokenizers without a template or to train with another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """Return a ChatML template.

    Args:
        before_content: Jinja expression of the text between the header and the content of a message.
    """
    return (
        _KNOWN_ROLES + "{% for m in messages %}"
        f"{{{{ '<|im_start|>' + m['role'] + '\n' + {before_content} + m['content'] + '<|im_end|>\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


_CHATML = _chatml()
# The generation prompt ends with an empty thought, so the last answer of a finished conversation starts with one.
_EMPTY_THOUGHT = (
    "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' and not add_generation_prompt else '')"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template that renders a conversation as text.

    Attributes:
        name: name in the configuration.
        source: Jinja source; None for the template of the tokenizer.
        tokens: markup that must be single tokens of the vocabulary.
        end_of_turn: token that ends an answer of the assistant; None if the tokenizer or model configuration has it.
        as_text: True if the text has no markup, so that the tokenizer adds its special tokens, e.g. a BOS token.
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
        # For base models: the contents of the messages, separated by blank lines.
        ChatTemplate("plain", "{{ messages | map(attribute='content') | join('\n\n') }}", as_text=True),
        ChatTemplate("chatml", _CHATML, _IM, _IM[1]),
        # ChatML with Qwen's system message if the conversation has none.
        ChatTemplate(
            "qwen2_5",
            "{% if messages[0]['role'] != 'system' %}"
            f"{{{{ '<|im_start|>system\n{_QWEN_SYSTEM}<|im_end|>\n' }}}}{{% endif %}}" + _CHATML,
            _IM,
            _IM[1],
        ),
        # Qwen3 without thinking: ChatML with an empty thought before the answer.
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
    """Return the template with the given name or from the given Jinja file.

    Raises:
        DataError: the name is unknown, or the file cannot be read or is no Jinja template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.suffix.startswith(".j"):
        known, hint = ", ".join(TEMPLATES), did_you_mean(name, list(TEMPLATES))
        raise DataError(f"template: unknown template '{name}'{hint} (known: {known}, or the path of a .jinja file)")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(
            f"template: {path} cannot be read ({reason}); correct the path, or use one of {', '.join(TEMPLATES)}"
        ) from error
    _check_jinja(source, path)
    return ChatTemplate(name, source)


def _check_jinja(source: str, path: Path) -> None:
    import jinja2
    from jinja2.ext import loopcontrols

    text = source.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )  # tags that transformers adds to Jinja
    try:
        jinja2.Environment(extensions=[loopcontrols]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template: {path}:{error.lineno}: invalid Jinja ({error.message}); correct it") from error
