"""Answers of GSM8K and MATH-500, surface forms of model output, and wrong answers derived from the correct ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

NUMBER_FORMS: tuple[str, ...] = (
    "3 + 4 = 7, so the answer follows.\n#### {}",
    "First 3 + 4 = 7. The answer is {}.",
    "So it is \\boxed{{{}}}.",
    "She makes **{}** in all",
    "It costs ${}",
    "Therefore $x = {}$.",
    "The final answer is $\\boxed{{x = {}}}$.",
    "So \\boxed{{{}.}}",
    "She needs \\boxed{{{}\\text{{ dollars}}}}",
    "<think>Perhaps \\boxed{{123456}}.</think>\nIt rises by \\boxed{{{}\\%}}",
)
FORMULA_FORMS: tuple[str, ...] = (
    "Thus \\boxed{{{}}}.",
    "Thus $\\boxed{{ {} \\; }}$.",
    "The final answer is ${}$. I hope it is correct.",
    "Therefore $${}$$",
    "Hence\n\\[\n{}\n\\]",
    "We get \\({}\\).",
    "So \\boxed{{{}.}}",
    "First \\boxed{{123456}}. No, it is \\boxed{{{}}}",
    "<think>Perhaps \\boxed{{123456}}.</think>\n\n**Answer:** ${}$",
    "\\[\n\\boxed{{\\displaystyle {}}}\n\\]",
)


def gsm8k() -> list[str]:
    """Return the 1,319 answers of the test split, with thousands separators."""
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]


def math_500() -> list[str]:
    """Return the 500 answers of MATH-500 in LaTeX."""
    lines = (DATA / "math_benchmarks" / "math_benchmarks.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["ground_truth"] for row in map(json.loads, lines) if row["source"] == "MATH-500"]


def restyled(answer: str) -> str:
    """Return the answer in another LaTeX style: display fractions, thousands separators."""
    if re.fullmatch(r"-?\d{4,}", answer):
        return f"{int(answer):,}"
    return answer.replace("\\frac", "\\dfrac")


def _number(text: str) -> Fraction | None:
    plain = re.sub(r",(?:\\!)?\s?|\\\$", "", text)
    return Fraction(plain) if re.fullmatch(r"-?\d*\.?\d+", plain) else None


def _wrong_numbers(answer: str) -> Iterator[str]:
    value = _number(answer)
    if value is None or value.denominator != 1:
        return
    digits = str(abs(value))
    for wrong in (value + 1, -value, 10 * value, Fraction(digits[::-1]), value / 2, value - 1, 2 * value + 3):
        # A percent sign divides a number by 100.
        if wrong not in (value, value / 100, 100 * value):
            yield str(wrong) if wrong.denominator == 1 else str(float(wrong))


def _wrong_fractions(answer: str) -> Iterator[str]:
    if found := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", answer):
        sign, top, bottom = found.groups()
        if top != bottom:
            yield f"{sign}\\frac{{{bottom}}}{{{top}}}"
        yield f"{'' if sign else '-'}\\frac{{{top}}}{{{bottom}}}"
        yield f"{sign}\\frac{{{int(top) + 1}}}{{{bottom}}}"


def _wrong_factors(answer: str) -> Iterator[str]:
    """Change the sign, the factor or the radicand of a multiple of a root or of pi."""
    if found := re.fullmatch(r"(-?)(\d*) ?\\(?:sqrt\{?(\d+)\}?|pi)", answer):
        sign, factor, root = found.groups()
        yield f"{'' if sign else '-'}{answer.lstrip('-')}"
        yield f"{sign}{int(factor or 1) + 1}\\{f'sqrt{{{root}}}' if root else 'pi'}"
        if root:
            yield f"{sign}{factor}\\sqrt{{{int(root) + 1}}}"


def _wrong_pairs(answer: str) -> Iterator[str]:
    """Change a number of a point or an interval, swap its numbers, or change its closing bracket."""
    if found := re.fullmatch(r"([(\[])(-?\d+), ?(-?\d+|\\infty)([)\]])", answer):
        opening, first, second, closing = found.groups()
        yield f"{opening}{int(first) - 1},{second}{closing}"
        yield f"{opening}{first},{second}9{closing}" if second != "\\infty" else f"{opening}{first},100{closing}"
        if second != "\\infty" and first != second:
            yield f"({second},{first})"
        if closing == "]":
            yield f"{opening}{first},{second})"


def _wrong_formulas(answer: str) -> Iterator[str]:
    """Add 1 to the last integer of a polynomial, a complex number or a vector, except exponents and indices."""
    numbers = [n for n in re.finditer(r"(?<![\d^_{.])\d+(?![\d.])", answer) if n.group() != "0"]
    if re.search(r"[a-z] [+-]|\di$|pmatrix", answer) and numbers:
        last = numbers[-1]
        yield f"{answer[: last.start()]}{int(last.group()) + 1}{answer[last.end() :]}"


def _wrong_texts(answer: str) -> Iterator[str]:
    if re.fullmatch(r"\\text\{\(?\w+\)?\}", answer):
        yield "\\text{north}"
        yield "\\text{(D)}"


MUTATIONS: tuple[Callable[[str], Iterator[str]], ...] = (
    *(_wrong_numbers, _wrong_fractions, _wrong_factors, _wrong_pairs, _wrong_formulas, _wrong_texts),
)


def wrong_answers(answers: list[str], count: int) -> list[tuple[str, str]]:
    """Return up to `count` pairs (correct answer, wrong answer), alternating between the kinds of mistakes."""
    golds = list(dict.fromkeys(answers))
    streams = [_pairs(golds, mutation) for mutation in MUTATIONS]
    pairs: dict[tuple[str, str], None] = {}
    while streams and len(pairs) < count:
        for stream in list(streams):
            pair = next(stream, None)
            if pair is None:
                streams.remove(stream)
            elif len(pairs) < count:
                pairs.setdefault(pair)
    return list(pairs)


def _pairs(golds: list[str], mutation: Callable[[str], Iterator[str]]) -> Iterator[tuple[str, str]]:
    for index, gold in enumerate(golds):
        if wrong := list(mutation(gold)):
            yield gold, wrong[index % len(wrong)]
