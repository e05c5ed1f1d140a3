"""`python -m roll_gspo.data check FILE [FILE...]`: what is wrong with data files, before a run finds out."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path

from roll_gspo.data.check import ERROR, WARNING, Checker, FileReport, Finding, prompts_of, spread
from roll_gspo.data.rows import Columns, DataRow, Reading, check_dataset_keys
from roll_gspo.data.templates import NATIVE, chat_template, check_tokenizer
from roll_gspo.errors import DataError, MissingDependencyError

MAX_FINDINGS = 20  # kinds shown of a file
MAX_NAMES = 12  # domains, tags or sources shown
MAX_DETAIL = 300  # characters


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: nothing is wrong, 1: something is, 2: the command line or a package is."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # data may hold half a character
    options = _parser().parse_args(arguments)
    columns = Columns(options.messages, options.prompt, options.ground_truth, options.tag)
    reading = Reading(columns, options.dataset_config, options.split)
    try:
        check_dataset_keys(options.files, "FILE", reading)
        num_tokens = _token_counter(options.tokenizer, options.template) if options.tokenizer else None
        against = prompts_of(options.against, reading) if options.against else {}
        reports = Checker(reading, num_tokens, against).check(options.files)
    except (DataError, MissingDependencyError) as error:
        print(f"roll_gspo.data: {error}", file=sys.stderr)
        return 2
    errors, warnings = (sum(report.num_findings(level) for report in reports) for level in (ERROR, WARNING))
    if options.json:
        print(json.dumps({"errors": errors, "warnings": warnings, "files": [r.as_json() for r in reports]}, indent=1))
    else:
        for report in reports:
            print("\n".join(_lines(report)), end="\n\n")
        print(_verdict(errors, warnings, sum(report.num_usable for report in reports)))
    return 1 if errors or (options.strict and warnings) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.data", description="Look at data before a run does.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="print what is wrong by line; status 0: nothing, 1: errors, 2: the command itself is wrong"
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="as in data_args.file_name")
    check.add_argument("--against", nargs="+", metavar="OTHER", help="files that must share no prompt with these")
    check.add_argument("--tokenizer", metavar="PATH", help="a model's folder: count the tokens of the prompts")
    check.add_argument("--template", default=NATIVE, help="chat template for --tokenizer, as in data_args.template")
    check.add_argument("--strict", action="store_true", help="warnings count as errors")
    check.add_argument("--json", action="store_true", help="print JSON")
    for key in ("messages", "prompt", "ground_truth", "dataset_config", "split"):
        check.add_argument(f"--{key}", metavar="NAME", help=f"as data_args.{key}")
    check.add_argument("--tag", default="tag", metavar="NAME", help="as data_args.tag")
    return parser


def _token_counter(folder: str, template_name: str) -> Callable[[DataRow], int]:
    """Counts the tokens of a conversation with its template; this reads tokenizer.json without importing torch."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer: {folder} has no tokenizer.json; give the folder of a model")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = chat_template(template_name)
    check_tokenizer(template, tokenizer)

    def num_tokens(row: DataRow) -> int:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in row.messages], chat_template=template.source, add_generation_prompt=True, tokenize=False
        )
        return len(tokenizer(str(text), add_special_tokens=template.as_text)["input_ids"])

    return num_tokens


def _lines(report: FileReport) -> Iterator[str]:
    counts = f"{report.num_findings(ERROR)} errors, {report.num_findings(WARNING)} warnings"
    usable = "" if report.num_usable == report.num_rows else f" ({report.num_usable} usable)"
    yield f"{report.name}: {report.num_rows} rows{usable}, {counts}"
    for finding in report.findings[:MAX_FINDINGS]:
        yield from _finding_lines(finding, report.name)
    if len(report.findings) > MAX_FINDINGS:
        yield f"  ... and {len(report.findings) - MAX_FINDINGS} other kinds; --json has all of them"
    if report.columns:
        yield "  columns  " + ", ".join(_column(name, c, report.num_rows) for name, c in report.columns.items())
    for title, names in (("domains", report.domains), ("tags", report.tags), ("sources", report.sources)):
        if set(names) - {""}:
            yield f"  {title:<8} " + _listed(names)
    for title, lengths in (("characters", report.characters), ("tokens", report.tokens)):
        if (figures := spread(lengths)) is not None:
            yield f"  prompt {title}: " + ", ".join(f"{name} {figure}" for name, figure in figures.items())


def _finding_lines(finding: Finding, file_name: str) -> Iterator[str]:
    rows = "" if finding.count == 1 else f" ({finding.count} rows)"
    yield f"  {finding.level}: {finding.kind}{rows}; {finding.fix}"
    for place, detail in finding.places:
        place = place.removeprefix(file_name).removeprefix(":")
        yield f"    {f'line {place}' if place.isdigit() else place or file_name}: {detail[:MAX_DETAIL]}"
    if finding.count > len(finding.places):
        yield f"    ... and {finding.count - len(finding.places)} more"


def _column(name: str, kinds: Counter[str], num_rows: int) -> str:
    share = "" if kinds.total() == num_rows else f", {kinds.total()} rows"
    return f"{name} ({'/'.join(kinds)}{share})"


def _listed(names: Counter[str]) -> str:
    most = ", ".join(f"{name or '(none)'} {count}" for name, count in names.most_common(MAX_NAMES))
    return most + (f", and {len(names) - MAX_NAMES} others" if len(names) > MAX_NAMES else "")


def _verdict(errors: int, warnings: int, usable: int) -> str:
    if errors:
        return f"{errors} errors: mend these rows, or leave them out with on_bad_row: skip where they cannot be read"
    return f"{usable} rows can be used" + (f"; see {warnings} warnings" if warnings else "")


if __name__ == "__main__":
    sys.exit(main())
