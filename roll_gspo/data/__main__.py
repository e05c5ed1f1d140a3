"""`python -m roll_gspo.data check FILE [FILE...]`: validate data files before a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from roll_gspo.data.check import ERROR, WARNING, Checker, FileReport, Finding, prompt_places, summarize_lengths
from roll_gspo.data.messages import Columns
from roll_gspo.data.rendering import check_tokenizer, render
from roll_gspo.data.rows import DataRow, ReadOptions, check_dataset_options
from roll_gspo.data.templates import NATIVE, chat_template
from roll_gspo.errors import DataError, MissingDependencyError
from roll_gspo.printable import printable, printable_line

MAX_FINDINGS = 20  # printed per file
MAX_NAMES = 12  # domains, tags or sources printed per file
MAX_DETAIL_CHARS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0 without errors, 1 with errors, 2 if the command line is wrong or a package is missing.
    """
    args = _parser().parse_args(arguments)
    columns = Columns(args.messages, args.prompt, args.ground_truth, args.tag)
    options = ReadOptions(columns, args.dataset_config, args.split, drop_last_answer=args.drop_last_answer)
    try:
        check_dataset_options(args.files, "FILE", options)
        num_tokens = _token_counter(args.tokenizer, args.template) if args.tokenizer else None
        against = prompt_places(args.against, options) if args.against else {}
        reports = Checker(options, num_tokens, against).check(args.files)
    except (DataError, MissingDependencyError) as error:
        print(printable(f"roll_gspo.data: {error}"), file=sys.stderr)
        return 2
    errors, warnings = (sum(report.num_findings(level) for report in reports) for level in (ERROR, WARNING))
    if args.json:
        print(json.dumps({"errors": errors, "warnings": warnings, "files": [r.as_json() for r in reports]}, indent=1))
    else:
        for report in reports:
            print("\n".join(map(printable_line, _lines(report))), end="\n\n")
        print(_summary(errors, warnings, sum(report.num_usable for report in reports)))
    return 1 if errors or (args.strict and warnings) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.data", description="Validate data files before a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="print problems by line; exit status 0: no errors, 1: errors, 2: wrong command line"
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="files or datasets, as in data_args.file_name")
    check.add_argument("--against", nargs="+", metavar="OTHER", help="files that must not share a prompt with these")
    check.add_argument("--tokenizer", metavar="PATH", help="folder of a model, to count the tokens of prompts")
    check.add_argument("--template", default=NATIVE, help="chat template for --tokenizer, as in data_args.template")
    check.add_argument("--strict", action="store_true", help="treat warnings as errors")
    check.add_argument("--json", action="store_true", help="print JSON")
    for key in ("messages", "prompt", "ground_truth", "dataset_config", "split"):
        check.add_argument(f"--{key}", metavar="NAME", help=f"see data_args.{key}")
    check.add_argument("--tag", default="tag", metavar="NAME", help="see data_args.tag")
    check.add_argument("--drop_last_answer", action="store_true", help="see data_args.drop_last_answer")
    return parser


def _token_counter(folder: str, template_name: str) -> Callable[[DataRow], int]:
    """Return a function that counts the tokens of a prompt. It reads tokenizer.json without importing torch."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer: {folder} has no tokenizer.json; name the folder of a model")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = chat_template(template_name)
    check_tokenizer(template, tokenizer)

    def num_tokens(row: DataRow) -> int:
        text = render(tokenizer, template, row.messages, row.tools, row.place, prompt=True)
        return len(tokenizer(text, add_special_tokens=template.as_text)["input_ids"])

    return num_tokens


def _lines(report: FileReport) -> Iterator[str]:
    counts = f"{report.num_findings(ERROR)} errors, {report.num_findings(WARNING)} warnings"
    usable = "" if report.num_usable == report.num_rows else f" ({report.num_usable} usable)"
    yield f"{report.name}: {report.num_rows} rows{usable}, {counts}"
    for finding in report.findings[:MAX_FINDINGS]:
        yield from _finding_lines(finding, report.name)
    if len(report.findings) > MAX_FINDINGS:
        yield f"  ... and {len(report.findings) - MAX_FINDINGS} other kinds; use --json to see all"
    if report.columns:
        yield "  columns  " + ", ".join(_column(name, c, report.num_rows) for name, c in report.columns.items())
    for title, names in (("domains", report.domains), ("tags", report.tags), ("sources", report.sources)):
        if set(names) - {""}:
            yield f"  {title:<8} " + _most_common(names)
    for title, lengths in (("characters", report.characters), ("tokens", report.tokens)):
        if (summary := summarize_lengths(lengths)) is not None:
            yield f"  prompt {title}: " + ", ".join(f"{name} {value}" for name, value in summary.items())


def _finding_lines(finding: Finding, file_name: str) -> Iterator[str]:
    rows = "" if finding.count == 1 else f" ({finding.count} rows)"
    yield f"  {finding.level}: {finding.kind}{rows}; {finding.fix}"
    for place, detail in finding.places:
        place = place.removeprefix(file_name).removeprefix(":")
        yield f"    {f'line {place}' if place.isdigit() else place or file_name}: {detail[:MAX_DETAIL_CHARS]}"
    if finding.count > len(finding.places):
        yield f"    ... and {finding.count - len(finding.places)} more"


def _column(name: str, types: Counter[str], num_rows: int) -> str:
    count = "" if types.total() == num_rows else f", {types.total()} rows"
    return f"{name} ({'/'.join(types)}{count})"


def _most_common(names: Counter[str]) -> str:
    most = ", ".join(f"{name or '(none)'} {count}" for name, count in names.most_common(MAX_NAMES))
    return most + (f", and {len(names) - MAX_NAMES} others" if len(names) > MAX_NAMES else "")


def _summary(errors: int, warnings: int, usable: int) -> str:
    if errors:
        return f"{errors} errors: correct these rows, or drop unreadable ones with on_bad_row: skip"
    return f"{usable} usable rows" + (f", {warnings} warnings" if warnings else "")


if __name__ == "__main__":
    sys.exit(main())
