"""Named chat templates, for tokenizers without a template or to train with another one."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roll_gspo.data.messages import Message
from roll_gspo.errors import DataError
from roll_gspo.registry import did_you_mean

NATIVE = "native"
PROBE = "Zx7PROBEq9"  # a text that no template contains
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


@dataclass(frozen=True)
class ChatFormat:
    """Chat templates and system prompts.

    Attributes:
        template: name of a template, or path of a Jinja file.
        tag_templates: templates by tag, which override `template` for rows with that tag.
        system_prompt: system message for conversations without one; None for none.
        domain_system_prompts: system messages by domain, which override `system_prompt`.
    """

    template: str = NATIVE
    tag_templates: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    domain_system_prompts: Mapping[str, str] = field(default_factory=dict)

    def templates(self) -> dict[str, ChatTemplate]:
        """Return all templates in use by name.

        Raises:
            DataError: a template does not exist.
        """
        return {name: chat_template(name) for name in (self.template, *self.tag_templates.values())}

    def with_system(self, messages: Sequence[Message], domain: str) -> Sequence[Message]:
        """Return the messages, with the system prompt of the domain if they have no system message."""
        content = self.domain_system_prompts.get(domain, self.system_prompt)
        if content is None or messages[0]["role"] == "system":
            return messages
        return ({"role": "system", "content": content}, *messages)


def _check_jinja(source: str, path: Path) -> None:
    import jinja2

    try:
        _environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template: {path}:{error.lineno}: invalid Jinja ({error.message}); correct it") from error


def probe(source: str) -> str | None:
    """Return what a template renders for a user message with the text `PROBE`, or None if it rejects the message.

    Raises:
        DataError: the source is no Jinja template.
    """
    import jinja2

    tokens = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": ""}
    try:
        template = _environment().from_string(source)
        return template.render(messages=[{"role": "user", "content": PROBE}], add_generation_prompt=True, **tokens)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"line {error.lineno} is invalid Jinja ({error.message})") from error
    except Exception:  # a template may need what only the tokenizer or a system message gives it
        return None


def _environment() -> Any:
    """Return a Jinja environment with the tags and functions that transformers gives to chat templates."""
    import datetime
    import json

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accept `{% generation %}` blocks."""

        tags = {"generation"}  # noqa: RUF012, set by the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def reject(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = reject
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def template_problem(template: ChatTemplate, own: Any, vocabulary: Container[str]) -> str | None:
    """Return why a model cannot use a template, or None.

    Args:
        template: template of the configuration.
        own: chat template of the tokenizer: source, sources by name, or None.
        vocabulary: tokens of the tokenizer.
    """
    known = ", ".join(name for name in TEMPLATES if name != NATIVE)
    if missing := [token for token in template.tokens if token not in vocabulary]:
        return (
            f"the chat template {template.name} needs the tokens {', '.join(missing)}, which the tokenizer lacks; use "
            "the template of this model family, or native"
        )
    source = template.source or (own.get("default") if isinstance(own, Mapping) else own)
    if not source:
        has = f"the chat templates {', '.join(own)}, but none called default" if own else "no chat template"
        return (
            f"the tokenizer has {has}; set data_args.template to one ({known}, or a .jinja file), or add chat_template "
            "to its tokenizer_config.json"
        )
    name = "of the tokenizer" if template.source is None else template.name
    try:
        rendered = probe(source)
    except DataError as error:
        return f"the chat template {name}: {error}; correct it, or set data_args.template to one of {known}"
    if rendered is not None and PROBE not in rendered:
        return (
            f"the chat template {name} does not render the content of a user message (it renders {rendered[:60]!r}); "
            f"correct it, or set data_args.template to one of {known}"
        )
    return None
