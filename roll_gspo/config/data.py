"""The block `data_args`: data files, columns and chat templates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema
from roll_gspo.registry import did_you_mean

CHAT_TEMPLATES = ("native", "plain", "chatml", "qwen2_5", "qwen3", "llama3")
FILE_KEYS = (
    "dataset_config",
    "split",
    "messages",
    "prompt",
    "ground_truth",
    "tag",
    "domain",
    "file_domains",
    "on_bad_row",
    "drop_last_answer",
)
SHARES_TOLERANCE = 0.005  # accepts rounding such as three times 0.333, but not 0.98


def _template(name: str) -> str:
    """Accept a known template or the path of a jinja file."""
    if name not in CHAT_TEMPLATES and not name.endswith((".jinja", ".jinja2", ".j2")):
        known, hint = ", ".join(CHAT_TEMPLATES), did_you_mean(name, list(CHAT_TEMPLATES))
        raise ValueError(f"unknown chat template '{name}'{hint} (known: {known}; or the path of a .jinja file)")
    return name


Template = Annotated[str, AfterValidator(_template)]


class SourceArgs(Schema):
    """Data files, their columns and chat templates."""

    file_name: Annotated[Names, Field(min_length=1)]
    """JSONL, JSON or parquet files. Folders and hub names are read by the `datasets` library; `openai/gsm8k@main:train`
    is name, configuration and split. `builtin:column_addition` is generated; `builtin:multi_domain` has short tasks of
    four domains."""
    dataset_config: str | None = None
    """Configuration of `datasets` names without one after `@`."""
    split: str | None = None
    """Split of `datasets` names without one after `:`; null: the only split."""
    num_rows: PositiveInt | None = None
    """Maximum number of rows to use, in file order, or number of rows to generate. Null: all rows of files, and 4,096
    generated ones (256 for validation)."""
    messages: str | None = None
    """Column of the conversation; null: `messages`, if the row has it. In all keys that name a column, a dotted name is
    a path into nested objects."""
    prompt: str | None = None
    """Column of the prompt, plain text or a conversation; null: `prompt` or `question`. The chat template is applied.
    ROLL applies none: `template: plain` does the same."""
    tag: str = "tag"
    """Column of the tag."""
    template: Template | None = None
    """Chat template: `native` (of the tokenizer), `plain`, `chatml`, `qwen2_5`, `qwen3` (without thinking), `llama3`
    or the path of a `.jinja` file. Null: `native`; in validation, the template of `actor_train`. `global_template` has
    precedence."""
    system_prompt: str | None = None
    """System message of every conversation without one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` stops at a malformed row with file and line; `skip` counts and drops it."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield file keys beside a builtin task, and two columns of prompts."""
        yield from super().broken_rules()
        if self.file_name[0].startswith("builtin:"):
            fields = type(self).model_fields  # conversations have fewer keys
            for key in (key for key in FILE_KEYS if key in fields):
                if (value := self.__dict__[key]) != fields[key].get_default(call_default_factory=True):
                    message = f"'{value}' describes a file, and {self.file_name[0]} is generated; remove it"
                    yield Problem(key, message, ("file_name",))
        if self.messages is not None and self.prompt is not None:
            message = (
                f"'{self.messages}' and prompt: '{self.prompt}' are both set, and a row has one of them; remove one"
            )
            yield Problem("messages", message, ("prompt",))


class DataArgs(SourceArgs):
    """Data files of prompts."""

    ground_truth: str | None = None
    """Column of the expected answer; null: `ground_truth`, the part of `answer` after `####`, or
    `reward_model.ground_truth`."""
    drop_last_answer: bool = False
    """Remove the assistant's messages at the end of a conversation, which the model is to write. Without it, such rows
    are malformed."""
    file_domains: dict[str, str] = Field(default_factory=dict)
    """Maps an entry of `file_name` to the domain of its rows without domain and tag."""
    domain: str | None = None
    """Domain of all other rows without domain and tag."""
    domain_interleave_probs: dict[str, NonNegativeFloat] | None = None
    """Share of each domain (a block of `rewards`) in every batch. Shares sum to 1; 0 drops a domain. Null: all rows are
    shuffled together."""
    domain_system_prompts: dict[str, str] = Field(default_factory=dict)
    """System prompts by domain (block of `rewards`), which replace `system_prompt`."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield unknown files, and shares that do not sum to 1."""
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
