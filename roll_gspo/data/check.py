"""What is wrong with data files, by line; the rows as they are, and what they have in common with others."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.data.files import Item, parse_json, shown
from roll_gspo.data.rows import Columns, DataRow, Problem, Reading, items_of, parse_row, source_names
from roll_gspo.errors import DataError

ERROR, WARNING = "error", "warning"
MAX_PLACES = 5  # shown of each kind of finding; all are counted
WHERE = "FILE"
PROMPT_COLUMNS = ("messages", "prompt", "question")
ANSWER_COLUMNS = ("ground_truth", "answer")


@dataclass
class Finding:
    """One kind of mistake in one file.

    Attributes:
        level: `error` (a run would stop, or judge wrongly) or `warning` (it may be meant so).
        kind: what is wrong.
        fix: what to do.
        count: rows that have it.
        places: (place, detail) of the first of them.
    """

    level: str
    kind: str
    fix: str
    count: int = 0
    places: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class FileReport:
    """What was found in one file.

    Attributes:
        name: of the file.
        num_rows, num_usable: all rows, and those that can be read.
        findings: errors first.
        columns: rows that have a column, by kind of value.
        domains, tags, sources: rows of each; the empty name is of those that have none.
        characters, tokens: length of each usable prompt; tokens only with a tokenizer.
    """

    name: str
    num_rows: int = 0
    num_usable: int = 0
    findings: list[Finding] = field(default_factory=list)
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    domains: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, level: str, problem: Problem, place: str) -> None:
        """Count a finding, and keep its place if it is among the first."""
        for finding in self.findings:
            if (finding.level, finding.kind) == (level, problem.kind):
                break
        else:
            finding = Finding(level, problem.kind, problem.fix)
            self.findings.append(finding)
        finding.count += 1
        if len(finding.places) < MAX_PLACES:
            finding.places.append((place, problem.detail))

    def num_findings(self, level: str) -> int:
        """Rows with findings of a level."""
        return sum(finding.count for finding in self.findings if finding.level == level)

    def as_json(self) -> dict[str, Any]:
        """The report in plain values."""
        return {
            "file": self.name,
            "rows": self.num_rows,
            "usable_rows": self.num_usable,
            "findings": [
                {
                    "level": f.level,
                    "kind": f.kind,
                    "fix": f.fix,
                    "count": f.count,
                    "first": [{"place": place, "detail": detail} for place, detail in f.places],
                }
                for f in self.findings
            ],
            "columns": {name: dict(kinds) for name, kinds in self.columns.items()},
            "rows_per_domain": dict(self.domains),
            "rows_per_tag": dict(self.tags),
            "rows_per_source": dict(self.sources),
            "prompt_characters": spread(self.characters),
            "prompt_tokens": spread(self.tokens),
        }


def spread(lengths: Sequence[int]) -> dict[str, int] | None:
    """Smallest, median, 95th percentile and largest; None of nothing."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    p95 = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return {"min": ordered[0], "median": int(statistics.median_low(ordered)), "p95": p95, "max": ordered[-1]}


class Checker:
    """Checks files that belong together, e.g. all training files: ids and prompts must not repeat among them.

    Args:
        reading: columns and splits.
        num_tokens: of a conversation, or None. It may raise what the chat template raises.
        against: places by prompt of other files, that must share no prompt with these.
    """

    def __init__(
        self,
        reading: Reading,
        num_tokens: Callable[[DataRow], int] | None = None,
        against: dict[str, str] | None = None,
    ) -> None:
        self._reading = reading
        self._num_tokens = num_tokens
        self._against = against or {}
        self._ids: dict[str, str] = {}
        self._prompts: dict[str, str] = {}

    def check(self, file_names: Sequence[str]) -> list[FileReport]:
        """One report a file; a file that cannot be read at all has that as its only error."""
        sources = source_names(file_names)
        return [self._check(name, source) for name, source in zip(file_names, sources, strict=True)]

    def _check(self, name: str, source: str) -> FileReport:
        report = FileReport(name)
        formats: dict[tuple[str, str], str] = {}
        try:
            for item in items_of(name, WHERE, self._reading):
                report.num_rows += 1
                self._check_item(item, source, report, formats)
        except DataError as error:
            text = str(error).removeprefix(f"{WHERE}: ")
            report.add(ERROR, Problem("the file cannot be read", text, "see there"), name)
        else:
            if not report.num_rows:
                report.add(ERROR, Problem("no row", "the file has no row", "write one JSON object a line"), name)
        for kind, place in list(formats.items()) if len(formats) > 1 else ():
            detail = f"the first row of {' + '.join(kind)}"
            fix = "keep one format a file, so that no column is taken for another"
            report.add(WARNING, Problem("rows of several formats", detail, fix), place)
        report.findings.sort(key=lambda finding: finding.level != ERROR)
        return report

    def _check_item(self, item: Item, source: str, report: FileReport, formats: dict[tuple[str, str], str]) -> None:
        row, problems = parse_row(item, self._reading.columns, source)
        if isinstance(item.value, dict):
            _count_columns(item.value, report)
        for problem in problems:
            report.add(ERROR, problem, item.place)
        if row is None:
            return
        report.num_usable += 1
        report.domains[row.domain] += 1
        report.tags[row.tag] += 1
        report.sources[_name(row.extra["source"])] += 1
        report.characters.append(sum(len(m["content"]) for m in row.messages))
        formats.setdefault(_format(item.value, self._reading.columns), item.place)
        for level, problem in (*_value_problems(row), *self._repeated(row, item), *self._length(row, report)):
            report.add(level, problem, item.place)

    def _repeated(self, row: DataRow, item: Item) -> Iterator[tuple[str, Problem]]:
        if row.id != item.place and (first := self._ids.setdefault(row.id, item.place)) != item.place:
            fix = "give each row an id of its own"
            yield WARNING, Problem("the id is there already", f"id {shown(row.id)} is that of {first}", fix)
        prompt = prompt_key(row)
        if (first := self._prompts.setdefault(prompt, item.place)) != item.place:
            fix = "leave one of them, unless it is meant to be drawn more often"
            yield WARNING, Problem("the prompt is there already", f"the same prompt as {first}", fix)
        if (other := self._against.get(prompt)) is not None:
            fix = "take it out of one of the two: what is trained on says nothing in validation"
            yield ERROR, Problem("the prompt is in the other files too", f"the same prompt as {other}", fix)

    def _length(self, row: DataRow, report: FileReport) -> Iterator[tuple[str, Problem]]:
        if self._num_tokens is None:
            return
        try:
            report.tokens.append(self._num_tokens(row))
        except Exception as error:  # what a template raises is up to its author
            roles = ", ".join(m["role"] for m in row.messages)
            fix = "choose another template, or leave the role out"
            yield ERROR, Problem("the chat template refuses the row", f"roles {roles}: {error}", fix)


def prompt_key(row: DataRow) -> str:
    """What two rows have in common that ask the same: all that the user says, whatever its white space."""
    said = [m["content"] for m in row.messages if m["role"] == "user"]
    return " ".join(" ".join(said or [row.messages[-1]["content"]]).split())


def prompts_of(file_names: Sequence[str], reading: Reading) -> dict[str, str]:
    """Place of every prompt of files whose rows need not all be good.

    Raises:
        DataError: a file cannot be read.
    """
    places: dict[str, str] = {}
    for name in file_names:
        for item in items_of(name, "--against", reading):
            row, _ = parse_row(item, reading.columns)
            if row is not None:
                places.setdefault(prompt_key(row), item.place)
    return places


def _value_problems(row: DataRow) -> Iterator[tuple[str, Problem]]:
    if not row.ground_truth.strip():
        fix = "add it, unless this row's reward needs none (a judge, a reward model)"
        yield WARNING, Problem("the ground truth is empty", "ground_truth is an empty text", fix)
    roles = [m["role"] for m in row.messages]
    if "system" in roles[1:]:
        fix = "put it first; most chat templates refuse it elsewhere"
        yield WARNING, Problem("a system message is not the first", f"roles {', '.join(roles)}", fix)
    if roles[-1] == "assistant":
        fix = "end with what the user says; the model writes the next message"
        yield WARNING, Problem("the conversation ends with the assistant", f"roles {', '.join(roles)}", fix)
    if any(not m["content"].strip() for m in row.messages):
        yield WARNING, Problem("a message is empty", f"roles {', '.join(roles)}", "write something, or leave it out")
    yield from _test_case_problems(row.extra.get("test_cases"))


def _test_case_problems(cases: Any) -> Iterator[tuple[str, Problem]]:
    if cases is None or cases == "":  # ROLL's rows of other domains have an empty text
        return
    fix = "write a list or an object, or either as a JSON text"
    if isinstance(cases, str):
        parsed = parse_json(cases)
        if isinstance(parsed, ValueError):
            yield ERROR, Problem("test_cases are not JSON", f"test_cases {shown(cases)}: {parsed}", fix)
            return
        cases = parsed
    if not isinstance(cases, list | dict):
        yield ERROR, Problem("test_cases are not JSON", f"test_cases are {shown(cases)}", fix)
    elif not cases:
        yield WARNING, Problem("test_cases are empty", f"test_cases are {shown(cases)}", "add some")


def _format(value: dict[str, Any], columns: Columns) -> tuple[str, str]:
    """Which columns prompt and answer come from."""
    named = columns.messages or columns.prompt
    prompts = (named,) if named else PROMPT_COLUMNS
    answers = (columns.ground_truth,) if columns.ground_truth else ANSWER_COLUMNS
    prompt, answer = (next(c for c in known if value.get(c) is not None) for known in (prompts, answers))
    return prompt, answer


def _count_columns(value: dict[str, Any], report: FileReport) -> None:
    for name, content in value.items():
        report.columns.setdefault(name, Counter())[_KINDS.get(type(content), "other")] += 1


_KINDS = {
    **{str: "text", bool: "true/false", int: "number", float: "number"},
    **{list: "list", dict: "object", type(None): "null"},
}


def _name(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
