"""The worst patterns of unclear English stay out of docstrings, comments, messages and pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted(
    file
    for folder in ("roll_gspo", "tests", "scripts", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
    if file != Path(__file__)
)
PLOTS = ROOT / "roll_gspo/compare/plot_style.py"  # matplotlib calls them figures
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])

# A docstring that leans on the name above it, or points elsewhere.
FRAGMENT = re.compile(r"(Of|From|By|As|Whose|Where|For|With|What|How|Whether|So|Such|See)\b(?! (?:long|soon))")
UNITS = "step|token|sample|prompt|response|rank|micro-batch|mini-batch|second|epoch|group|worker|layer|sequence|update"
PATTERNS = {
    "'per', not 'a'": re.compile(
        rf"\b(?:tokens?|samples?|steps?|prompts?|responses?|seconds|updates?|generations?|bytes|nats|micro-batches|"
        rf"mini-batches|figures|metrics|lines?|files?|rows?|once|twice|times|s|ms|processes) an? (?:{UNITS})\b"
    ),
    "'metrics', not 'figures'": re.compile(r"(?<![/\[\w])\bfigures\b(?!/)", re.IGNORECASE),
    "'if', not 'where it is left out'": re.compile(r"\bwhere (?:it|they|this|that) (?:is|are) left out\b"),
    "no 'of its own'": re.compile(r"\bof (?:its|their|one's) own\b"),
    "no personification": re.compile(
        r"\b(?:taken for hung|said aloud|teaches? nothing|needs no word|nobody (?:is|has|can|waits|needs))\b"
    ),
}
OLD_NAMES = re.compile(
    r"\b(?:JudgedBatch|SampleJudge|Wire[A-Z]\w+|Arrangement|cut_samples|work_off|take_in|give_back|SftParts|"
    r"build_parts|makers\.py|advice\.py|attention\.py|wire(?:_\w+)?\.py|judge\.py: Judge)\b"
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, including those of class attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for item in body if isinstance(body, list) else ():
            if (
                isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            ):
                yield item.lineno, item.value.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every string literal with several words, parts of f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


@cache
def prose_of(file: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, text) of everything in a file that people read."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return tuple(enumerate(text.splitlines(), start=1))
    return (*strings(ast.parse(text)), *comments(text))


def where(file: Path, line: int) -> str:
    """Return the position of a finding."""
    return f"{file.relative_to(ROOT)}:{line}"


def test_docstrings_start_with_a_verb_or_a_noun_phrase() -> None:
    wrong = [
        f"{where(file, line)}: {text.strip().splitlines()[0]}"
        for file in CODE
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        if FRAGMENT.match(text.strip())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rule", PATTERNS)
def test_prose_uses_plain_words(rule: str) -> None:
    wrong = [
        f"{where(file, line + text[: match.start()].count(chr(10)))}: {match[0]}"
        for file in [*CODE, *PAGES, *CONFIGS]
        if file != PLOTS or "figures" not in rule
        for line, text in prose_of(file)
        for match in PATTERNS[rule].finditer(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_old_names_are_gone() -> None:
    wrong = [
        f"{where(file, number)}: {match[0]}"
        for file in [*CODE, *PAGES, *CONFIGS]
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if file.name != "CHANGELOG.md"
        for match in OLD_NAMES.finditer(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("two tokens a step", "'per', not 'a'"),
        ("the figures of a run", "'metrics', not 'figures'"),
        ("the default where it is left out", "'if', not 'where it is left out'"),
        ("a process of its own", "no 'of its own'"),
        ("nobody waits", "no personification"),
    ],
)
def test_each_rule_finds_its_pattern(text: str, rule: str) -> None:
    assert PATTERNS[rule].search(text)
    assert FRAGMENT.match("Of any role; every engine scores") and not FRAGMENT.match("Offset of the first token")
