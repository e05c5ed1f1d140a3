"""Degenerate responses: which text reaches the parser, and which expressions are refused before any evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("math_verify")
from roll_gspo.rewards import math_equality
from roll_gspo.rewards.math_bounds import MAX_CHARS, UnboundedError, check_bounded, may_parse
from roll_gspo.rewards.math_equality import Formulas
from roll_gspo.rewards.math_rule import MathRule
from roll_gspo.rewards.math_text import normalize

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "degenerate_responses.py"
SIZE = 20_000


@pytest.fixture(scope="module")
def forms() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("degenerate_responses", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forms(SIZE)


def test_parser_gets_at_most_one_short_formula_of_a_response(forms, monkeypatch) -> None:
    parsed: list[str] = []
    parse = math_equality.parse
    monkeypatch.setattr(math_equality, "parse", lambda text, **options: parsed.append(text) or parse(text, **options))
    rule = MathRule(timeout_s=60)
    rule("", "7", "7")
    assert len(forms) >= 60 and all(len(text) >= SIZE * 0.99 for text in forms.values())
    for name, text in forms.items():
        parsed.clear()
        score = rule("", text, "31").score
        assert score == 0 and len(parsed) <= 1, name
        assert all(len(formula) <= MAX_CHARS + len("\\boxed{}") for formula in parsed), name


@pytest.mark.parametrize(
    "formula",
    [
        "x^x^x^x", "x_x_x_x", "2^{2}^{2}^{2}", "2^{2^{2^{2^{2}}}}", "9!!", "((((x)(y))(z))(w))",
        "|" * 10 + "x" + "|" * 10,
        "\\sqrt{" * 9 + "2" + "}" * 9, "1+" * 60 + "1", "x" * 200, "a=b=c=d=e=f=g=h", "(1,2)" + "\\cup(1,2)" * 9,
        "\\int_0^1 x dx", "\\lim_{x\\to 0} x", "\\frac{d}{dx} x", "\\sum_{i=1}^2\\sum_{j=1}^2 ij",
        "\\binom{100000}{50000}", "{{{", "1}", "7" * (MAX_CHARS + 1),
    ],
)  # fmt: skip
def test_costly_text_is_not_parsed(formula: str) -> None:
    assert not may_parse(normalize(formula))


@pytest.mark.parametrize(
    "formula",
    [
        "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1", "x_1^2 + x_2^2 + x_3^2", "2^{2^{5}}", "f(g(h(x)))",
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
        "\\left(\\frac{(a+b)^2}{(c-d)^3}, \\frac{\\pi}{2}\\right)",
        "\\sqrt{2+\\sqrt{2+\\sqrt{2}}}", "\\frac{1}{1+\\frac{1}{1+\\frac{1}{2}}}", "\\sum_{k=1}^{n} k^2", "10^{100}",
    ],
)  # fmt: skip
def test_ordinary_text_is_parsed(formula: str) -> None:
    assert may_parse(normalize(formula))


@pytest.mark.parametrize(
    ("formula", "bounded"),
    [
        ("9^{9^{9}}", False), ("7^{9999999999}", False), ("(10^9)!", False), ("3000!", False),
        ("\\sin(10^{9999})", False),
        ("\\sqrt[9]{10^{9999}}", False), ("\\sum_{k=1}^{10000} k", False), ("(2^{100})^{1000}", False),
        ("e^{e^{99}}", False), ("2^{2006}", True), ("20!", True), ("\\sum_{k=1}^{100} k", True), ("x^{50}", True),
        ("10^{1000}", True), ("\\sqrt{2}+\\sin 1", True), ("(1+\\frac{1}{1000})^{1000}", True),
    ],
)  # fmt: skip
def test_expression_is_evaluated_if_its_value_is_bounded(formula: str, bounded: bool) -> None:
    (expression,) = Formulas(60).parse(normalize(formula))
    if bounded:
        check_bounded(expression)
    else:
        with pytest.raises(UnboundedError):
            check_bounded(expression)


def test_unbounded_answer_equals_only_itself() -> None:
    rule = MathRule(timeout_s=60)
    assert rule("", "\\boxed{9^{9^{9}}}", "9^{9^9}").score == 1
    assert rule("", "\\boxed{9^{9^{9}}}", "9^{9^8}").score == rule("", "\\boxed{9^{9^{9}}}", "3").score == 0
