"""Where prompts come from and how they are put to the model: `data_args`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema
from roll_gspo.registry import did_you_mean

CHAT_TEMPLATES = ("native", "plain", "chatml", "qwen2_5", "qwen3", "llama3")
OF_FILES = (
    "dataset_config",
    "split",
    "messages",
    "prompt",
    "ground_truth",
    "tag",
    "domain",
    "file_domains",
    "on_bad_row",
)
SHARES_TOLERANCE = 0.005  # 0.333 three times, or percentages without decimals, are rounding; 0.98 is a slip


def _template(name: str) -> str:
    """A name of the table, or the path of a jinja file."""
    if name not in CHAT_TEMPLATES and not name.endswith((".jinja", ".jinja2", ".j2")):
        known, hint = ", ".join(CHAT_TEMPLATES), did_you_mean(name, list(CHAT_TEMPLATES))
        raise ValueError(f"unknown chat template '{name}'{hint} (known: {known}; or the path of a .jinja file)")
    return name


Template = Annotated[str, AfterValidator(_template)]


class SourceArgs(Schema):
    """Where rows come from, and how their conversations are put to the model."""

    file_name: Annotated[Names, Field(min_length=1)]
    """JSONL, JSON or parquet files; folders or hub names for the `datasets` library (`openai/gsm8k@main:train` is
    name, configuration and split); `builtin:column_addition` (generated on the spot), or
    `builtin:multi_domain` (short tasks of four domains)."""
    dataset_config: str | None = None
    """Configuration of the `datasets` names that give none after an `@`."""
    split: str | None = None
    """Split of the `datasets` names that give none after a `:`; null: the only one."""
    num_rows: PositiveInt | None = None
    """Use (or generate) at most this many rows: the first, in the order of the files."""
    messages: str | None = None
    """Column of the conversation; null: `messages`, where a row has it."""
    prompt: str | None = None
    """Column of a prompt that is plain text or a conversation; null: `prompt` or `question`. The chat template is
    applied to it (ROLL applies none; `template: plain` does as ROLL)."""
    tag: str = "tag"
    """Column of the tag."""
    template: Template | None = None
    """Chat template: `native` (the tokenizer's own), `plain`, `chatml`, `qwen2_5`, `qwen3` (not thinking), `llama3`, or
    the path of a `.jinja` file. Null: `native`; in validation, that of `actor_train`. `global_template` wins."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop the run with file and line, or be counted and left out."""

    def broken_rules(self) -> Iterator[Problem]:
        """One column of prompts; none where the rows are of this package."""
        yield from super().broken_rules()
        if self.file_name[0].startswith("builtin:"):
            fields = type(self).model_fields  # of which conversations have fewer
            for key in (key for key in OF_FILES if key in fields):
                if (value := self.__dict__[key]) != fields[key].get_default(call_default_factory=True):
                    message = f"'{value}' describes a file, and {self.file_name[0]} is generated; remove it"
                    yield Problem(key, message, ("file_name",))
        if self.messages is not None and self.prompt is not None:
            message = (
                f"'{self.messages}' and prompt: '{self.prompt}' are both set, and a row has one of them; remove one"
            )
            yield Problem("messages", message, ("prompt",))


class DataArgs(SourceArgs):
    """Where prompts come from."""

    ground_truth: str | None = None
    """Column of what the reward compares with; null: `ground_truth`, or `answer`, of which the part after `####`."""
    file_domains: dict[str, str] = Field(default_factory=dict)
    """Domain of the rows of a file that have neither domain nor tag: an entry of `file_name` to a domain."""
    domain: str | None = None
    """Domain of all other rows that name neither a domain nor a tag."""
    domain_interleave_probs: dict[str, NonNegativeFloat] | None = None
    """Share of each domain (a block of `rewards`) in every batch; they sum to 1, and 0 leaves a domain out. Null: all
    rows are shuffled together."""
    domain_system_prompts: dict[str, str] = Field(default_factory=dict)
    """System prompts of single domains (blocks of `rewards`), instead of `system_prompt`."""

    def broken_rules(self) -> Iterator[Problem]:
        """Shares of a whole, and only files that are there."""
        yield from super().broken_rules()
        if strange := [name for name in self.file_domains if name not in self.file_name]:
            message = f"{', '.join(strange)} is not in file_name; write it as there, or remove it"
            yield Problem("file_domains", message, ("file_name",))
        shares = self.domain_interleave_probs
        if shares is not None:
            total = math.fsum(shares.values())
            if not abs(total - 1) <= SHARES_TOLERANCE:
                listed = " + ".join(f"{share:g}" for share in shares.values()) or "nothing"
                yield Problem("domain_interleave_probs", f"the sum is {total:g} ({listed}), not 1; change them")
