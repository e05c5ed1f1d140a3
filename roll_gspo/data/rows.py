"""Parsing of data rows from files and datasets, in ROLL's format or as plain questions and answers."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from roll_gspo.data.files import RawRow, abbreviate, read_file
from roll_gspo.data.hf_datasets import parse_dataset_name, read_dataset
from roll_gspo.data.messages import (
    Columns,
    Message,
    Problem,
    ends_with_answer,
    pop_messages,
    read_tools,
    take,
    without_last_answer,
)
from roll_gspo.errors import DataError

logger = logging.getLogger(__name__)
GSM8K_SEPARATOR = "####"
# One number with thousands separators, perhaps with a unit. Other commas separate values.
_GROUPED_NUMBER = re.compile(r"[^\d,()\[\]{}]*[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?[^\d,()\[\]{}]*")
RESERVED_COLUMNS = ("prompt", "response")  # arguments of every reward, so columns with these names are dropped
RowT = TypeVar("RowT")
ANSWER_COLUMNS = ("ground_truth", "answer", "reward_model.ground_truth")  # the last one is verl's
ANSWER_SUBSTITUTES = ("instruction_id_list", "test_cases")  # rows with one of these need no ground truth


@dataclass(frozen=True)
class DataRow:
    """One validated row of any supported format.

    Attributes:
        id: id of the row, or `file:line` if it has none.
        messages: messages ({role, content, ...}) of the conversation.
        ground_truth: expected answer; empty if the row has an empty one or needs none.
        domain, tag: labels that select the reward; empty if the row has none.
        extra: other columns. They always include `source`, which defaults to the name of the file.
        tools: schemas of the functions that the model may call.
        place: `file:line`, for error messages.
    """

    id: str
    messages: tuple[Message, ...]
    ground_truth: str
    domain: str = ""
    tag: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that rewards receive, and the ground truth."""
        labels = {"id": self.id, "ground_truth": self.ground_truth, "domain": self.domain, "tag": self.tag}
        return {**self.extra, **labels}

    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading data files and datasets.

    Attributes:
        columns: names of the columns.
        dataset_config, split: configuration and split of datasets whose name has none.
        file_domains: domain by file name, for rows with neither domain nor tag.
        drop_last_answer: remove the assistant's messages at the end of a conversation instead of refusing the row.
    """

    columns: Columns = field(default_factory=Columns)
    dataset_config: str | None = None
    split: str | None = None
    file_domains: Mapping[str, str] = field(default_factory=dict)
    drop_last_answer: bool = False


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
        return parse_row(item, read_options, sources[file_name], domain)

    hint = " (python -m roll_gspo.data check {} lists all problems)"
    return read_parsed(file_names, key, on_bad_row, read_options, parse, hint)


def read_parsed(
    file_names: Sequence[str],
    key: str,
    on_bad_row: str,
    options: ReadOptions,
    parse: Callable[[RawRow, str], tuple[RowT | None, tuple[Problem, ...]]],
    hint: str = "",
) -> list[RowT]:
    """Read all rows in order and parse them with a function.

    Args:
        file_names, key, on_bad_row, options: see `read_rows`.
        parse: function that maps a raw row and the name of its file to (row, no problems) or (None, problems).
        hint: end of the error message of a malformed row; `{}` is replaced by the file.

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
                fix = f"{problems[0].fix}, or set on_bad_row: skip next to {key}"
                raise DataError(f"{text}; {fix}{hint.format(file_name)}")
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


def parse_row(item: RawRow, options: ReadOptions, source: str = "", domain: str = "") -> Parsed:
    """Validate a raw row.

    Args:
        item: raw row.
        options: names of the columns, and whether to drop an answer at the end of the conversation.
        source: default of the column `source`.
        domain: domain of a row with neither domain nor tag, and also its default `source`.
    """
    rest = row_columns(item.value)
    if isinstance(rest, Problem):
        return Parsed(None, (rest,))
    columns, found = options.columns, ", ".join(rest)
    messages, problems = _pop_prompt(rest, options, found)
    answer, tools = _pop_answer(rest, columns, found), read_tools(rest)
    problems = (*problems, *(found for found in (answer, tools) if isinstance(found, Problem)))
    if problems or isinstance(answer, Problem) or isinstance(tools, Problem):
        return Parsed(None, problems)
    tag = as_text(take(rest, columns.tag))
    row_domain = as_text(rest.pop("domain", None))
    if rest.get("source") is None:
        named = source if tag or row_domain else domain or source
        rest["source"] = rest["data_source"] if isinstance(rest.get("data_source"), str) else named
    for name in RESERVED_COLUMNS:
        rest.pop(name, None)
    row = DataRow(
        id=as_text(rest.pop("id", None)) or item.place,
        messages=messages,
        ground_truth=answer,
        domain=row_domain or ("" if tag else domain),
        tag=tag,
        extra=rest,
        tools=tools,
        place=item.place,
    )
    return Parsed(row, ())


def _pop_prompt(
    rest: dict[str, Any], options: ReadOptions, found: str
) -> tuple[tuple[Message, ...], tuple[Problem, ...]]:
    """Remove and return (messages, problems): a conversation that the model continues with an answer."""
    messages, problems = pop_messages(rest, options.columns, found)
    if problems:
        return (), problems
    if options.drop_last_answer:
        messages = without_last_answer(messages)
        if not messages:
            detail = "all messages are from the assistant, so there is no prompt"
            return (), (Problem("no prompt", detail, "add a user message"),)
    problem = ends_with_answer(messages)
    return (messages, ()) if problem is None else ((), (problem,))


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
        if (answer := take(rest, columns.ground_truth)) is not None:
            return _answer_text(answer)
        detail = f"no answer: expected column {columns.ground_truth}, found {found}"
        return Problem("no answer", detail, "add the column, or set data_args.ground_truth to its name")
    own, worked, nested = ANSWER_COLUMNS
    answer = rest.pop(own, None)
    if answer is None:
        answer = _final_answer(rest.pop(worked, None))
    if answer is None:
        answer = take(rest, nested)
    if answer is not None:
        return _answer_text(answer)
    if any(rest.get(name) is not None for name in ANSWER_SUBSTITUTES):
        return ""
    detail = f"no answer: expected column ground_truth or answer (empty if there is none), found {found}"
    return Problem("no answer", detail, "add ground_truth, or set data_args.ground_truth to the name of the column")


def _answer_text(answer: Any) -> str:
    """Return an answer as text. In verl's rows it is the `ground_truth` of an object such as `reward_model`."""
    inner = answer.get("ground_truth") if isinstance(answer, dict) else None
    return as_text(answer if inner is None else inner)


def _final_answer(answer: Any) -> Any:
    """Return the final answer of GSM8K's format, which is the solution followed by `#### 1,234`."""
    if isinstance(answer, str) and GSM8K_SEPARATOR in answer:
        final = answer.rpartition(GSM8K_SEPARATOR)[2].strip()
        return final.replace(",", "") if _GROUPED_NUMBER.fullmatch(final) else final
    return answer


def as_text(value: Any) -> str:
    """Return a value as text: strings as they are, null as "", floats without an exponent, others as JSON."""
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")
    return value if isinstance(value, str) else json.dumps(value, default=str)
