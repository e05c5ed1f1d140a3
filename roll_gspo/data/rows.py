"""Parsing of data rows from files and datasets, in ROLL's format or as plain questions and answers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from roll_gspo.data.files import RawRow, abbreviate, parse_json, read_file
from roll_gspo.data.hf_datasets import parse_dataset_name, read_dataset
from roll_gspo.errors import DataError
from roll_gspo.registry import did_you_mean

logger = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant", "tool")
GSM8K_SEPARATOR = "####"
RESERVED_COLUMNS = ("prompt", "response")  # arguments of every reward, so columns with these names are dropped
RowT = TypeVar("RowT")
_ANSWER_SUBSTITUTES = ("instruction_id_list", "test_cases")  # rows with one of these need no ground truth
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


@dataclass(frozen=True)
class DataRow:
    """One validated row of any supported format.

    Attributes:
        id: id of the row, or `file:line` if it has none.
        messages: messages ({role, content}) of the conversation.
        ground_truth: expected answer; empty if the row has an empty one or needs none.
        domain, tag: labels that select the reward; empty if the row has none.
        extra: other columns. They always include `source`, which defaults to the name of the file.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    domain: str = ""
    tag: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """Names of columns; None for the default names.

    Attributes:
        messages: column of the conversation.
        prompt: column of the prompt, which is a text or a conversation.
        ground_truth: column of the expected answer, which is used unchanged.
        tag: column of the tag.
    """

    messages: str | None = None
    prompt: str | None = None
    ground_truth: str | None = None
    tag: str = "tag"


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading data files and datasets.

    Attributes:
        columns: names of the columns.
        dataset_config, split: configuration and split of datasets whose name has none.
        file_domains: domain by file name, for rows with neither domain nor tag.
    """

    columns: Columns = Columns()
    dataset_config: str | None = None
    split: str | None = None
    file_domains: Mapping[str, str] = field(default_factory=dict)


class Problem(NamedTuple):
    """A problem of a row.

    Attributes:
        kind: kind of the problem, with the same text for all rows.
        detail: description with the values of the row.
        fix: how to fix it.
    """

    kind: str
    detail: str
    fix: str


class Parsed(NamedTuple):
    """A validated row, or None and the problems of the row."""

    row: DataRow | None
    problems: tuple[Problem, ...]


def read_rows(
    file_names: Sequence[str], key: str, on_bad_row: str = "error", options: ReadOptions | None = None
) -> list[DataRow]:
    """Read all rows in order.

    Args:
        file_names: JSONL (one object per line), `.json` (list of objects) or `.parquet` files, folders, or names on the
            Hugging Face Hub.
        key: YAML key of the files, for error messages.
        on_bad_row: `error` to raise at a malformed row, or `skip` to drop it with a warning.
        options: columns, splits and domains; None for the defaults.

    Raises:
        DataError: a file is missing or empty, or a row is malformed; the message has file and line.
        MissingDependencyError: the package that reads the format is not installed.
    """
    read_options = options or ReadOptions()
    sources = dict(zip(file_names, source_names(file_names), strict=True))

    def parse(item: RawRow, file_name: str) -> Parsed:
        domain = read_options.file_domains.get(file_name, "")
        return parse_row(item, read_options.columns, sources[file_name], domain)

    fix = "correct the row (python -m roll_gspo.data check {} lists all problems)"
    return read_parsed(file_names, key, on_bad_row, read_options, parse, fix)


def read_parsed(
    file_names: Sequence[str],
    key: str,
    on_bad_row: str,
    options: ReadOptions,
    parse: Callable[[RawRow, str], tuple[RowT | None, tuple[Problem, ...]]],
    fix: str = "correct the row",
) -> list[RowT]:
    """Read all rows in order and parse them with a function.

    Args:
        file_names, key, on_bad_row, options: see `read_rows`.
        parse: function that maps a raw row and the name of its file to (row, no problems) or (None, problems).
        fix: advice in the error message of a malformed row; `{}` is replaced by the file.

    Raises:
        DataError, MissingDependencyError: see `read_rows`.
    """
    check_dataset_options(file_names, key, options)
    rows: list[RowT] = []
    for file_name in file_names:
        skipped: list[str] = []
        before = len(rows)
        for item in raw_rows(file_name, key, options):
            row, problems = parse(item, file_name)
            if row is not None:
                rows.append(row)
                continue
            text = f"{item.place}: {problems[0].detail}"
            if on_bad_row == "error":
                raise DataError(f"{text}; {fix.format(file_name)}, or set on_bad_row: skip next to {key}")
            skipped.append(text)
        if skipped:
            logger.warning("%s: skipped %d malformed rows, first: %s", file_name, len(skipped), skipped[0])
        if len(rows) == before:
            raise DataError(f"{key}: {file_name} has no usable row; add at least one")
    return rows


def raw_rows(file_name: str, key: str, options: ReadOptions) -> Iterator[RawRow]:
    """Yield the raw rows of a file or dataset."""
    dataset = parse_dataset_name(file_name)
    if dataset is None:
        return read_file(Path(file_name), key)
    config, split = dataset.config or options.dataset_config, dataset.split or options.split
    return read_dataset(dataset._replace(config=config, split=split), key)


def check_dataset_options(file_names: Sequence[str], key: str, options: ReadOptions) -> None:
    """Check that `dataset_config` and `split` are only set if there is a dataset.

    Raises:
        DataError: one of them is set, and all names are files.
    """
    for option, value in (("dataset_config", options.dataset_config), ("split", options.split)):
        if value is not None and all(parse_dataset_name(name) is None for name in file_names):
            raise DataError(
                f"{key}: {option} is '{value}', but {', '.join(file_names)} are files, which have none; remove {option}"
            )


def source_names(file_names: Sequence[str]) -> list[str]:
    """Return the source name of each file: its name without folder and extension, or the whole path if ambiguous."""
    names = [dataset.name if (dataset := parse_dataset_name(name)) else name for name in file_names]
    stems = [Path(name).name if parse_dataset_name(name) else Path(name).name.split(".")[0] for name in names]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, file_names, strict=True)]


def parse_row(item: RawRow, columns: Columns, source: str = "", domain: str = "") -> Parsed:
    """Validate a raw row.

    Args:
        item: raw row.
        columns: names of the columns.
        source: default of the column `source`.
        domain: domain of a row with neither domain nor tag, and also its default `source`.
    """
    rest = row_columns(item.value)
    if isinstance(rest, Problem):
        return Parsed(None, (rest,))
    found = ", ".join(rest)
    messages, problems = pop_messages(rest, columns, found)
    answer = _pop_answer(rest, columns, found)
    if isinstance(answer, Problem):
        problems = (*problems, answer)
    if problems or isinstance(answer, Problem):
        return Parsed(None, problems)
    tag = as_text(rest.pop(columns.tag, None))
    row_domain = as_text(rest.pop("domain", None))
    if rest.get("source") is None:
        rest["source"] = source if tag or row_domain else domain or source
    for name in RESERVED_COLUMNS:
        rest.pop(name, None)
    row = DataRow(
        id=as_text(rest.pop("id", None)) or item.place,
        messages=messages,
        ground_truth=answer,
        domain=row_domain or ("" if tag else domain),
        tag=tag,
        extra=rest,
    )
    return Parsed(row, ())


def row_columns(value: Any) -> dict[str, Any] | Problem:
    """Return a copy of the columns of a raw value, or a problem if it is no JSON object."""
    if isinstance(value, ValueError):
        return Problem("not valid JSON", f"not valid JSON ({value})", "write one JSON object per line")
    if not isinstance(value, dict):
        hint = "use a .json file for a list" if isinstance(value, list) else "write one JSON object per line"
        return Problem("not a JSON object", f"expected a JSON object, got {abbreviate(value)}", hint)
    return dict(value)


def _pop_answer(rest: dict[str, Any], columns: Columns, found: str) -> str | Problem:
    """Remove and return the answer from the columns."""
    if columns.ground_truth is not None:
        if (answer := rest.pop(columns.ground_truth, None)) is not None:
            return as_text(answer)
        detail = f"no answer: expected column {columns.ground_truth}, found {found}"
        return Problem("no answer", detail, "add the column, or set data_args.ground_truth to its name")
    answer = rest.get("ground_truth")
    if answer is None:
        answer = _final_answer(rest.pop("answer", None))
    rest.pop("ground_truth", None)
    if answer is not None:
        return as_text(answer)
    if any(rest.get(name) is not None for name in _ANSWER_SUBSTITUTES):
        return ""
    detail = f"no answer: expected column ground_truth or answer (empty if there is none), found {found}"
    return Problem("no answer", detail, "add ground_truth, or set data_args.ground_truth to the name of the column")


def pop_messages(
    rest: dict[str, Any], columns: Columns, found: str, forbid_extra_keys: bool = False
) -> tuple[tuple[dict[str, str], ...], tuple[Problem, ...]]:
    """Remove and return the conversation from the columns of a row; a prompt becomes a user message.

    Args:
        rest: columns of the row, which are modified.
        columns: names of the columns.
        found: names of all columns of the row, for error messages.
        forbid_extra_keys: if True, a message with other keys than role and content is a problem.

    Returns:
        (messages, problems), one of them empty.
    """
    conversation, texts = columns.messages or "messages", ("prompt", "question")
    if columns.prompt is not None:
        conversation, texts = "", (columns.prompt,)
    elif columns.messages is not None:
        texts = ()
    value = rest.pop(conversation, None)
    prompts = [rest.pop(name, None) for name in texts]
    if value is None:
        text = next((p for p in prompts if p is not None), None)
        if isinstance(text, str) and text.strip():
            return ({"role": "user", "content": text},), ()
        if not isinstance(text, list):
            expected = columns.prompt or columns.messages or "messages, prompt or question"
            reason = "it is empty" if isinstance(text, str) else f"found {found}"
            detail = f"no prompt: expected column {expected}, {reason}"
            return (), (Problem("no prompt", detail, "add one, or set data_args.prompt to the name of the column"),)
        value = text
    if isinstance(value, str):  # data files of ROLL store the list as JSON
        value = parse_json(value)
        if isinstance(value, ValueError):
            detail = f"messages must be a list of {{role, content}}, got a string that is not JSON ({value})"
            return (), (Problem("messages: not valid JSON", detail, "write a list, or the JSON text of one"),)
    if not isinstance(value, list) or not value:
        detail = f"messages must be a list of {{role, content}}, got {abbreviate(value)}"
        return (), (Problem("messages: not a list of messages", detail, "write [{role, content}, ...]"),)
    problems = tuple(
        p for number, m in enumerate(value, start=1) for p in _message_problems(m, number, forbid_extra_keys)
    )
    return () if problems else tuple({"role": m["role"], "content": m["content"]} for m in value), problems


def _message_problems(message: Any, number: int, forbid_extra_keys: bool) -> Iterator[Problem]:
    expected = f"messages must be a list of {{role, content}}, but message {number}"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        fix = "rename from to role and value to content" if _is_share_gpt(message) else "write {role, content}"
        yield Problem("messages: no role or content", f"{expected} is {abbreviate(message)}; {fix}", fix)
        return
    role, content = message["role"], message["content"]
    if role not in ROLES:
        alias = _ROLE_ALIASES.get(str(role))
        hint = f"; did you mean '{alias}'?" if alias else did_you_mean(str(role), list(ROLES))
        detail = f"{expected} has the unknown role {abbreviate(role)} (known: {', '.join(ROLES)}){hint}"
        yield Problem(f"messages: unknown role {abbreviate(role)}", detail, f"use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        detail = f"{expected} has the content {abbreviate(content)}, not a string"
        yield Problem("messages: content is not a string", detail, "write the content as one string")
    others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if others and forbid_extra_keys:
        detail = f"message {number} has {', '.join(others)}, but only role and content are read"
        yield Problem("messages: keys besides role and content", detail, "move them into the content")


def _is_share_gpt(message: Any) -> bool:
    return isinstance(message, dict) and {"from", "value"} <= set(message)


def _final_answer(answer: Any) -> Any:
    """Return the final answer of GSM8K's format, which is the solution followed by `#### 1,234`."""
    if isinstance(answer, str) and GSM8K_SEPARATOR in answer:
        return answer.rpartition(GSM8K_SEPARATOR)[2].strip().replace(",", "")
    return answer


def as_text(value: Any) -> str:
    """Return a value as a string: strings unchanged, null as the empty string, others as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
