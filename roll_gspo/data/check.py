"""Validation of data files: problems by line, statistics, and duplicates within and between files."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.data.files import RawRow, abbreviate, parse_json
from roll_gspo.data.messages import PROMPT_COLUMNS, Columns, Problem, lookup
from roll_gspo.data.rows import (
    ANSWER_COLUMNS,
    ANSWER_SUBSTITUTES,
    DataRow,
    ReadOptions,
    parse_row,
    raw_rows,
    source_names,
)
from roll_gspo.errors import DataError

ERROR, WARNING = "error", "warning"
MAX_PLACES = 5  # places kept per finding; all are counted
KEY = "FILE"


@dataclass
class Finding:
    """One kind of problem in one file.

    Attributes:
        level: `error` if a run would stop or score incorrectly, `warning` if the data may be intended.
        kind: kind of the problem.
        fix: how to fix it.
        count: number of rows with the problem.
        places: (place, detail) of the first rows with the problem.
    """

    level: str
    kind: str
    fix: str
    count: int = 0
    places: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class FileReport:
    """Findings and statistics of one file.

    Attributes:
        name: name of the file.
        num_rows, num_usable: number of rows, and of rows without errors.
        findings: findings, errors first.
        columns: number of rows by column and type of its value.
        domains, tags, sources: number of rows by label; rows without one have the empty label.
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
        """Count a problem, and keep the first `MAX_PLACES` places of its kind."""
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
        """Return the number of findings of a level, counted per row."""
        return sum(finding.count for finding in self.findings if finding.level == level)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
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
            "prompt_characters": summarize_lengths(self.characters),
            "prompt_tokens": summarize_lengths(self.tokens),
        }


def summarize_lengths(lengths: Sequence[int]) -> dict[str, int] | None:
    """Return minimum, median, 95th percentile and maximum, or None if there are no lengths."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    p95 = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return {"min": ordered[0], "median": int(statistics.median_low(ordered)), "p95": p95, "max": ordered[-1]}


class Checker:
    """Checks files that are used together, e.g. all training files: ids and prompts must be unique among them.

    Args:
        options: columns and splits.
        num_tokens: function that returns the number of tokens of a prompt, or None. It raises a `DataError` if the
            chat template rejects the row.
        against: places by prompt of other files, which must not share a prompt with these.
    """

    def __init__(
        self,
        options: ReadOptions,
        num_tokens: Callable[[DataRow], int] | None = None,
        against: dict[str, str] | None = None,
    ) -> None:
        self._options = options
        self._num_tokens = num_tokens
        self._against = against or {}
        self._ids: dict[str, str] = {}
        self._prompts: dict[str, str] = {}

    def check(self, file_names: Sequence[str]) -> list[FileReport]:
        """Return one report per file; a file that cannot be read has one error."""
        sources = source_names(file_names)
        return [self._check(name, source) for name, source in zip(file_names, sources, strict=True)]

    def _check(self, name: str, source: str) -> FileReport:
        report = FileReport(name)
        formats: dict[tuple[str, str], str] = {}
        try:
            for item in raw_rows(name, KEY, self._options):
                report.num_rows += 1
                self._check_item(item, source, report, formats)
        except DataError as error:
            text = str(error).removeprefix(f"{KEY}: ")
            report.add(ERROR, Problem("the file cannot be read", text, "see the detail"), name)
        else:
            if not report.num_rows:
                report.add(ERROR, Problem("no rows", "the file has no rows", "write one JSON object per line"), name)
        for columns, place in list(formats.items()) if len(formats) > 1 else ():
            detail = f"first row with {' + '.join(columns)}"
            fix = "use one format per file, so that no column is mistaken for another"
            report.add(WARNING, Problem("rows of several formats", detail, fix), place)
        report.findings.sort(key=lambda finding: finding.level != ERROR)
        return report

    def _check_item(self, item: RawRow, source: str, report: FileReport, formats: dict[tuple[str, str], str]) -> None:
        row, problems = parse_row(item, self._options, source)
        if isinstance(item.value, dict):
            _count_columns(item.value, report)
        for problem in problems:
            report.add(ERROR, problem, item.place)
        if row is None:
            return
        report.num_usable += 1
        report.domains[row.domain] += 1
        report.tags[row.tag] += 1
        report.sources[_label(row.extra["source"])] += 1
        report.characters.append(sum(len(m["content"]) for m in row.messages))
        formats.setdefault(_format(item.value, self._options.columns), item.place)
        for level, problem in (*_value_problems(row), *self._duplicates(row, item), *self._count_tokens(row, report)):
            report.add(level, problem, item.place)

    def _duplicates(self, row: DataRow, item: RawRow) -> Iterator[tuple[str, Problem]]:
        if row.id != item.place and (first := self._ids.setdefault(row.id, item.place)) != item.place:
            fix = "give each row a unique id"
            yield WARNING, Problem("duplicate id", f"id {abbreviate(row.id)} is also the id of {first}", fix)
        prompt = prompt_key(row)
        if (first := self._prompts.setdefault(prompt, item.place)) != item.place:
            fix = "remove one of them, unless it should be sampled more often"
            yield WARNING, Problem("duplicate prompt", f"same prompt as {first}", fix)
        if (other := self._against.get(prompt)) is not None:
            fix = "remove it from one of the two, because training on validation prompts invalidates the validation"
            yield ERROR, Problem("prompt shared with --against", f"same prompt as {other}", fix)

    def _count_tokens(self, row: DataRow, report: FileReport) -> Iterator[tuple[str, Problem]]:
        if self._num_tokens is None:
            return
        try:
            report.tokens.append(self._num_tokens(row))
        except DataError as error:
            detail = str(error).removeprefix(f"{row.place}: ")
            yield ERROR, Problem("rejected by the chat template", detail, "see the detail")


def prompt_key(row: DataRow) -> str:
    """Return the text that identifies a prompt: all user messages with normalized whitespace."""
    contents = [m["content"] for m in row.messages if m["role"] == "user"]
    return " ".join(" ".join(contents or [row.messages[-1]["content"]]).split())


def prompt_places(file_names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Return the first place of each prompt in the files; malformed rows are skipped.

    Raises:
        DataError: a file cannot be read.
    """
    places: dict[str, str] = {}
    for name in file_names:
        for item in raw_rows(name, "--against", options):
            row, _ = parse_row(item, options)
            if row is not None:
                places.setdefault(prompt_key(row), item.place)
    return places


def _value_problems(row: DataRow) -> Iterator[tuple[str, Problem]]:
    if not row.ground_truth.strip() and not any(row.extra.get(name) for name in ANSWER_SUBSTITUTES):
        fix = "add it, unless the reward of the row needs none (LLM judge, reward model)"
        yield WARNING, Problem("empty ground truth", "ground_truth is empty", fix)
    roles = [m["role"] for m in row.messages]
    if "system" in roles[1:]:
        fix = "put it first; most chat templates reject it elsewhere"
        yield WARNING, Problem("system message is not first", f"roles {', '.join(roles)}", fix)
    if any(not m["content"].strip() and len(m) == 2 for m in row.messages):
        yield WARNING, Problem("empty message", f"roles {', '.join(roles)}", "add its content, or remove it")
    yield from _test_case_problems(row.extra.get("test_cases"))


def _test_case_problems(cases: Any) -> Iterator[tuple[str, Problem]]:
    if cases is None or cases == "":  # in ROLL, rows of other domains have an empty string
        return
    fix = "write a list or an object, or the JSON text of one"
    if isinstance(cases, str):
        parsed = parse_json(cases)
        if isinstance(parsed, ValueError):
            yield ERROR, Problem("test_cases is not JSON", f"test_cases {abbreviate(cases)}: {parsed}", fix)
            return
        cases = parsed
    if not isinstance(cases, list | dict):
        yield ERROR, Problem("test_cases is not JSON", f"test_cases is {abbreviate(cases)}", fix)
    elif not cases:
        yield WARNING, Problem("test_cases is empty", f"test_cases is {abbreviate(cases)}", "add at least one case")


def _format(value: dict[str, Any], columns: Columns) -> tuple[str, str]:
    """Return the columns of the prompt and of the answer."""
    configured = columns.messages or columns.prompt
    prompts = (configured,) if configured else PROMPT_COLUMNS
    answers = (columns.ground_truth,) if columns.ground_truth else (*ANSWER_COLUMNS, *ANSWER_SUBSTITUTES)
    prompt, answer = ([c for c in known if lookup(value, c) is not None] for known in (prompts, answers))
    return prompt[0], answer[0]


def _count_columns(value: dict[str, Any], report: FileReport) -> None:
    for name, content in value.items():
        report.columns.setdefault(name, Counter())[_TYPE_NAMES.get(type(content), "other")] += 1


_TYPE_NAMES = {
    **{str: "text", bool: "true/false", int: "number", float: "number"},
    **{list: "list", dict: "object", type(None): "null"},
}


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
