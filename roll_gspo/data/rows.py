"""Data rows, in ROLL's format or as plain question and answer, from files and named data sets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from roll_gspo.data.files import Item, parse_json, read_file, shown
from roll_gspo.data.named import dataset_name, read_dataset
from roll_gspo.errors import DataError
from roll_gspo.registry import did_you_mean

logger = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant", "tool")
GSM8K_MARK = "####"
ARGUMENTS = ("prompt", "response")  # a reward is called with these; a column of the same name would be in their way
RowT = TypeVar("RowT")
_INSTEAD_OF_AN_ANSWER = ("instruction_id_list", "test_cases")  # these say themselves what is right
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


@dataclass(frozen=True)
class DataRow:
    """One row, whatever format it had.

    Attributes:
        id: of the row; `file:line` where the data gives none.
        messages: the conversation so far, ({role, content}, ...).
        ground_truth: what the reward compares with; empty only where the row says so.
        domain, tag: which reward judges it; empty where the row does not say.
        extra: its other columns; `source` is always one of them, the name of the file where the row does not say.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    domain: str = ""
    tag: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: by the names that are known.

    Attributes:
        messages: a conversation.
        prompt: a text, or a conversation.
        ground_truth: what the reward compares with, taken as it is.
        tag: the tag.
    """

    messages: str | None = None
    prompt: str | None = None
    ground_truth: str | None = None
    tag: str = "tag"


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        columns: their names.
        dataset_config, split: of `datasets` names that do not say.
        file_domains: domain of the rows of a file that have neither domain nor tag.
    """

    columns: Columns = Columns()
    dataset_config: str | None = None
    split: str | None = None
    file_domains: Mapping[str, str] = field(default_factory=dict)


class Problem(NamedTuple):
    """What is wrong with a row.

    Attributes:
        kind: the mistake, the same text for every row that has it.
        detail: with the values of this row.
        fix: what to do.
    """

    kind: str
    detail: str
    fix: str


class Parsed(NamedTuple):
    """A row as far as it could be read; it is None where there are problems."""

    row: DataRow | None
    problems: tuple[Problem, ...]


def read_rows(
    file_names: Sequence[str], where: str, on_bad_row: str = "error", reading: Reading | None = None
) -> list[DataRow]:
    """Read every row, in order.

    Args:
        file_names: JSONL (one object a line), `.json` (a list of objects) or `.parquet` files, folders, hub names.
        where: YAML key that named the files, for the errors.
        on_bad_row: `error` or `skip` (counted and logged).
        reading: columns, splits and domains that differ from the usual.

    Raises:
        DataError: a file is missing or empty, or a row is malformed: with file and line.
        MissingDependencyError: the package that reads the format is not installed.
    """
    known = reading or Reading()
    sources = dict(zip(file_names, source_names(file_names), strict=True))

    def parse(item: Item, file_name: str) -> Parsed:
        return parse_row(item, known.columns, sources[file_name], known.file_domains.get(file_name, ""))

    lister = "mend the row (python -m roll_gspo.data check {} lists all such)"
    return read_each(file_names, where, on_bad_row, known, parse, lister)


def read_each(
    file_names: Sequence[str],
    where: str,
    on_bad_row: str,
    reading: Reading,
    parse: Callable[[Item, str], tuple[RowT | None, tuple[Problem, ...]]],
    way_out: str = "mend the row",
) -> list[RowT]:
    """Read every row, in order, whatever rows are.

    Args:
        file_names, where, on_bad_row, reading: see `read_rows`.
        parse: a value and the name of its file to a row, or to None and what is wrong with it.
        way_out: of an error in a row; `{}` is the file.

    Raises:
        DataError, MissingDependencyError: see `read_rows`.
    """
    check_dataset_keys(file_names, where, reading)
    rows: list[RowT] = []
    for file_name in file_names:
        skipped: list[str] = []
        before = len(rows)
        for item in items_of(file_name, where, reading):
            row, problems = parse(item, file_name)
            if row is not None:
                rows.append(row)
                continue
            text = f"{item.place}: {problems[0].detail}"
            if on_bad_row == "error":
                raise DataError(f"{text}; {way_out.format(file_name)}, or set on_bad_row: skip beside {where}")
            skipped.append(text)
        if skipped:
            logger.warning("%s: %d malformed rows skipped, the first: %s", file_name, len(skipped), skipped[0])
        if len(rows) == before:
            raise DataError(f"{where}: {file_name} has no usable row; give a file with at least one")
    return rows


def items_of(file_name: str, where: str, reading: Reading) -> Iterator[Item]:
    """The values of a file, or of what the `datasets` library knows by this name."""
    named = dataset_name(file_name)
    if named is None:
        return read_file(Path(file_name), where)
    config, split = named.config or reading.dataset_config, named.split or reading.split
    return read_dataset(named._replace(config=config, split=split), where)


def check_dataset_keys(file_names: Sequence[str], where: str, reading: Reading) -> None:
    """See that `dataset_config` and `split` have something to act on.

    Raises:
        DataError: all names are files.
    """
    for key, value in (("dataset_config", reading.dataset_config), ("split", reading.split)):
        if value is not None and all(dataset_name(name) is None for name in file_names):
            raise DataError(
                f"{where}: {key} is '{value}', but {', '.join(file_names)} are files, which have none; remove {key}"
            )


def source_names(file_names: Sequence[str]) -> list[str]:
    """What to call each file: its name without folder and ending, or whole where two would be called the same."""
    names = [named.name if (named := dataset_name(name)) else name for name in file_names]
    stems = [Path(name).name if dataset_name(name) else Path(name).name.split(".")[0] for name in names]
    shared = Counter(stems)
    return [stem if shared[stem] == 1 else name for stem, name in zip(stems, file_names, strict=True)]


def parse_row(item: Item, columns: Columns, source: str = "", domain: str = "") -> Parsed:
    """A row of its values, or everything that is wrong with it.

    Args:
        item: as read.
        columns: where to look.
        source: of the rows that do not say.
        domain: of the rows that have neither domain nor tag, and the source of those of them that do not say.
    """
    rest = columns_of(item.value)
    if isinstance(rest, Problem):
        return Parsed(None, (rest,))
    found = ", ".join(rest)
    messages, problems = take_messages(rest, columns, found)
    answer = _answer(rest, columns, found)
    if isinstance(answer, Problem):
        problems = (*problems, answer)
    if problems or isinstance(answer, Problem):
        return Parsed(None, problems)
    tag = text_of(rest.pop(columns.tag, None))
    own_domain = text_of(rest.pop("domain", None))
    if rest.get("source") is None:
        rest["source"] = source if tag or own_domain else domain or source
    for name in ARGUMENTS:
        rest.pop(name, None)
    row = DataRow(
        id=text_of(rest.pop("id", None)) or item.place,
        messages=messages,
        ground_truth=answer,
        domain=own_domain or ("" if tag else domain),
        tag=tag,
        extra=rest,
    )
    return Parsed(row, ())


def columns_of(value: Any) -> dict[str, Any] | Problem:
    """The columns of a value as it was read, in a dictionary of its own; or why it has none."""
    if isinstance(value, ValueError):
        return Problem("not valid JSON", f"not valid JSON ({value})", "write one JSON object a line")
    if not isinstance(value, dict):
        hint = "a JSON list goes in a .json file" if isinstance(value, list) else "write one JSON object a line"
        return Problem("not a JSON object", f"expected a JSON object, got {shown(value)}", hint)
    return dict(value)


def _answer(rest: dict[str, Any], columns: Columns, found: str) -> str | Problem:
    """Take the answer out of the columns."""
    if columns.ground_truth is not None:
        if (answer := rest.pop(columns.ground_truth, None)) is not None:
            return text_of(answer)
        detail = f"no answer: expected {columns.ground_truth}, found {found}"
        return Problem("no answer", detail, "add the column, or set data_args.ground_truth to its name")
    answer = rest.get("ground_truth")
    if answer is None:
        answer = _final_answer(rest.pop("answer", None))
    rest.pop("ground_truth", None)
    if answer is not None:
        return text_of(answer)
    if any(rest.get(name) is not None for name in _INSTEAD_OF_AN_ANSWER):
        return ""
    detail = f"no answer: expected ground_truth or answer (an empty text if none), found {found}"
    return Problem("no answer", detail, "add ground_truth, or set data_args.ground_truth to the column's name")


def take_messages(
    rest: dict[str, Any], columns: Columns, found: str, nothing_lost: bool = False
) -> tuple[tuple[dict[str, str], ...], tuple[Problem, ...]]:
    """Take the conversation, or the prompt as one of the user's, out of the columns of a row.

    Args:
        rest: the columns, of which those of the conversation are removed.
        columns: where to look.
        found: names of all columns, for the errors.
        nothing_lost: a message with more than role and content is a problem, too.
    """
    conversation, texts = columns.messages or "messages", ("prompt", "question")
    if columns.prompt is not None:
        conversation, texts = "", (columns.prompt,)
    elif columns.messages is not None:
        texts = ()
    value = rest.pop(conversation, None)
    named = [rest.pop(name, None) for name in texts]
    if value is None:
        text = next((t for t in named if t is not None), None)
        if isinstance(text, str) and text.strip():
            return ({"role": "user", "content": text},), ()
        if not isinstance(text, list):
            known = columns.prompt or columns.messages or "messages, prompt or question"
            what = "it is empty" if isinstance(text, str) else f"found {found}"
            detail = f"no prompt: expected {known}, {what}"
            return (), (Problem("no prompt", detail, "add one, or set data_args.prompt to the column's name"),)
        value = text
    if isinstance(value, str):  # ROLL's files hold the list as a JSON string
        value = parse_json(value)
        if isinstance(value, ValueError):
            detail = f"messages must be a list of {{role, content}}, got a text that is not JSON ({value})"
            return (), (Problem("messages: not valid JSON", detail, "write a list, or the list as a JSON text"),)
    if not isinstance(value, list) or not value:
        detail = f"messages must be a list of {{role, content}}, got {shown(value)}"
        return (), (Problem("messages: not a list of messages", detail, "write [{role, content}, ...]"),)
    problems = tuple(p for number, m in enumerate(value, start=1) for p in _message_problems(m, number, nothing_lost))
    return () if problems else tuple({"role": m["role"], "content": m["content"]} for m in value), problems


def _message_problems(message: Any, number: int, nothing_lost: bool) -> Iterator[Problem]:
    expected = f"messages must be a list of {{role, content}}, but message {number}"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        fix = "rename from to role and value to content" if _is_share_gpt(message) else "write {role, content}"
        yield Problem("messages: no role or content", f"{expected} is {shown(message)}; {fix}", fix)
        return
    role, content = message["role"], message["content"]
    if role not in ROLES:
        near = _OTHER_NAMES.get(str(role))
        hint = f"; did you mean '{near}'?" if near else did_you_mean(str(role), list(ROLES))
        detail = f"{expected} has the unknown role {shown(role)} (known: {', '.join(ROLES)}){hint}"
        yield Problem(f"messages: unknown role {shown(role)}", detail, f"use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        detail = f"{expected} has the content {shown(content)}, not a text"
        yield Problem("messages: content is not a text", detail, "write the content as one text")
    others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if others and nothing_lost:
        detail = f"message {number} has {', '.join(others)}, which would be lost: only role and content are read"
        yield Problem("messages: more than role and content", detail, "write them into the content")


def _is_share_gpt(message: Any) -> bool:
    return isinstance(message, dict) and {"from", "value"} <= set(message)


def _final_answer(answer: Any) -> Any:
    """GSM8K writes the working, then `#### 1,234`."""
    if isinstance(answer, str) and GSM8K_MARK in answer:
        return answer.rpartition(GSM8K_MARK)[2].strip().replace(",", "")
    return answer


def text_of(value: Any) -> str:
    """A column's value as text, as JSON where it is none; empty for null."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
