"""`code_sandbox`: test cases of a Python program in the response, run in a sandbox."""

from __future__ import annotations

import decimal
import math
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.code_cases import CallCase, InvalidCasesError, StdinCase, UnitTests, parse_cases, parse_json
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.sandbox import Limits, Outcome, Program, Sandbox

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#-]*)", re.MULTILINE)
_PYTHON = {"python", "python3", "py"}
_MIN_TIME_S = 0.05


class CodeSandbox:
    """Score 1 if the program in the response passes all test cases of the row, else 0; or the fraction that passes.

    The program is the last Python code block after the thinking, else the last code block of any language. For
    the formats of test cases see `code_cases`. Each case runs in a separate process without network, files, other
    processes or environment variables. The expected output never enters that process. Unit tests run in another
    process.

    Args:
        partial: if True, the score is the fraction of passed cases. Otherwise it is 0 or 1, and the cases after the
            first failure are skipped.
        time_limit_s: seconds per case, by the clock and of CPU time.
        total_s: seconds for all cases of a sample; cases that have not run by then fail. Keep it below `timeout_s` of
            the reward's block, after which the whole sample fails.
        memory_mb: MiB that a program may use.
        max_cases: number of cases to use per row, from the first; null for all.
        float_tolerance: absolute or relative tolerance of expected numbers with a decimal point or an exponent. With
            0, numbers must be equal, but `1.0` still matches `1.00`. Expected integers must be equal in any case.
        allow_bare: if True, a response without a code block is the program.
        packages: installed packages that programs may import besides the standard library, e.g. [numpy].
        allow_unsafe: if True, programs run without isolation on a host that does not support it. Otherwise the reward
            does not start there.
    """

    def __init__(
        self,
        partial: bool = False,
        time_limit_s: float = 4.0,
        total_s: float = 8.0,
        memory_mb: int = 1024,
        max_cases: int | None = None,
        float_tolerance: float = 1e-6,
        allow_bare: bool = False,
        packages: Sequence[str] = (),
        allow_unsafe: bool = False,
    ) -> None:
        if max_cases is not None and max_cases < 1:
            raise ValueError(f"code_sandbox: max_cases is {max_cases}; use 1 or more, or null for all")
        if total_s <= 0 or float_tolerance < 0:
            raise ValueError(
                f"code_sandbox: total_s is {total_s:g} and float_tolerance {float_tolerance:g}; the first must be "
                "positive, the second must not be negative"
            )
        self._partial, self._total_s = partial, total_s
        self._max_cases, self._tolerance, self._allow_bare = max_cases, float_tolerance, allow_bare
        limits = Limits(wall_s=time_limit_s, cpu_s=time_limit_s, memory_mb=memory_mb)
        self._sandbox = Sandbox(limits, packages, allow_unsafe)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        try:
            cases = parse_cases(row)[: self._max_cases]
        except InvalidCasesError as error:
            raise ValueError(f"code_sandbox: row '{row.get('id', '?')}': {error}") from None
        deadline = time.monotonic() + self._total_s
        answer = text_after_thinking(prompt, response)
        if isinstance(cases[0], UnitTests):
            return self._run_unit_tests(cases[0], answer, deadline, row)
        source = extract_program(answer, self._allow_bare)
        if source is None:
            return self._output([], len(cases), compiled=False)
        with self._sandbox.start(source, _remaining(deadline)) as program:
            passed: list[bool] = []
            while not program.problem and len(passed) < len(cases) and (self._partial or all(passed)):
                if time.monotonic() >= deadline:
                    break
                passed.append(self._passes(program, cases[len(passed)], _remaining(deadline)))
            return self._output(passed, len(cases), compiled=not program.problem)

    def _passes(self, program: Program, case: StdinCase | CallCase | UnitTests, wall_s: float) -> bool:
        if isinstance(case, StdinCase):
            outcome = program.run(case.stdin, wall_s)
            return outcome.ok and same_output(outcome.stdout, case.expected, self._tolerance)
        assert isinstance(case, CallCase)
        outcome = program.call(case.function, case.arguments, wall_s)
        value = _parse_stdout(outcome)
        return value is not _NO_VALUE and any(same_value(value, wanted, self._tolerance) for wanted in case.expected)

    def _run_unit_tests(self, cases: UnitTests, answer: str, deadline: float, row: Mapping[str, Any]) -> RewardOutput:
        """Run unit tests. All tests of a row share one process, so that a test that hangs also fails the later ones."""
        sources = cases.sources[: self._max_cases]
        if not answer.strip():
            return self._output([], len(sources), compiled=False)
        with self._sandbox.start("") as test_program:
            compiled = True
            if cases.tests_text:
                texts = [source.replace("{response}", repr(answer)) for source in sources]
                outcome = test_program.run_standalone_tests(texts, _remaining(deadline))
            else:
                source = extract_program(answer, self._allow_bare)
                if source is None:
                    return self._output([], len(sources), compiled=False)
                source = f"{cases.prefix}\n{source}" if cases.prefix else source
                with self._sandbox.start(source, _remaining(deadline)) as program:
                    compiled = not program.problem
                    if not compiled:
                        return self._output([], len(sources), compiled=False)
                    outcome = program.run_tests(test_program, sources, cases.entry_point, _remaining(deadline))
        result = _parse_stdout(outcome)
        if not isinstance(result, dict):  # the tests exceeded a limit
            return self._output([], len(sources), compiled)
        if "malformed" in result:
            raise ValueError(f"code_sandbox: row '{row.get('id', '?')}': test_cases: {result['malformed']}")
        return self._output([bool(one) for one in result["passed"]], len(result["passed"]), compiled)

    def _output(self, passed: Sequence[bool], num_cases: int, compiled: bool) -> RewardOutput:
        pass_rate = sum(passed) / num_cases
        components = {"compiled": float(compiled), "all_passed": float(pass_rate == 1)}
        if self._partial:
            components["pass_rate"] = pass_rate
        return RewardOutput(pass_rate if self._partial else float(pass_rate == 1), components=components)


def extract_program(answer: str, allow_bare: bool = False) -> str | None:
    """Return the last Python code block, else the last code block, else None.

    Args:
        answer: text after the thinking.
        allow_bare: if True, return the whole text if it has no code block.
    """
    blocks = _code_blocks(answer)
    chosen = [text for language, text in blocks if language in _PYTHON] or [text for _, text in blocks]
    if chosen:
        return textwrap.dedent(chosen[-1])
    return answer if allow_bare and answer.strip() and "```" not in answer else None


def _code_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each closed code block.

    A single regular expression for whole blocks would backtrack for minutes on a page of backticks.
    """
    fences = list(_FENCE.finditer(text))
    blocks, start = [], 0
    while start < len(fences):
        later = range(start + 1, len(fences))
        end = next((index for index in later if fences[index][1].startswith(fences[start][1])), start)
        if end > start:
            content = text[text.index("\n", fences[start].end()) + 1 : fences[end].start()]
            blocks.append((fences[start][2].lower(), content))
        start = end + 1
    return blocks


def same_output(actual: str, expected: str, tolerance: float) -> bool:
    """Return whether two outputs consist of the same words, ignoring whitespace.

    Args:
        actual: output of the program.
        expected: output of the test case.
        tolerance: absolute or relative tolerance of numbers, if the expected one has a decimal point or an exponent.
    """
    given, wanted = actual.split(), expected.split()
    return len(given) == len(wanted) and all(
        a == b or _are_close(a, b, tolerance) for a, b in zip(given, wanted, strict=True)
    )


def same_value(actual: Any, expected: Any, tolerance: float) -> bool:
    """Return whether a returned value is the expected one.

    Args:
        actual: JSON value.
        expected: JSON value, or a set of them, which a list equals in any order.
        tolerance: absolute or relative tolerance of numbers if `expected` is a float. Integers and booleans are equal
            only to the same number, and `True` does not equal `1`.
    """
    if isinstance(expected, set | frozenset) and isinstance(actual, list):
        expected, actual = sorted(expected, key=repr), sorted(actual, key=repr)
    if isinstance(expected, list) and isinstance(actual, list):
        pairs = zip(actual, expected, strict=False)
        return len(actual) == len(expected) and all(same_value(a, b, tolerance) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(same_value(actual[k], expected[k], tolerance) for k in expected)
    if isinstance(expected, bool) or isinstance(actual, bool):
        return actual is expected
    if isinstance(expected, float) and isinstance(actual, int | float):
        try:
            return math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:  # an integer beyond the range of floats
            return False
    return actual == expected


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NO_VALUE = object()


def _are_close(actual: str, expected: str, tolerance: float) -> bool:
    if len(actual) > 400 or not (_NUMBER.fullmatch(actual) and _NUMBER.fullmatch(expected)):
        return False
    if set(".eE").isdisjoint(expected):  # integers are equal to the digit
        try:
            return not set(".eE").isdisjoint(actual) and decimal.Decimal(actual) == decimal.Decimal(expected)
        except decimal.InvalidOperation:  # the exponent is out of range
            return False
    return math.isclose(float(actual), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def _remaining(deadline: float) -> float:
    return max(_MIN_TIME_S, deadline - time.monotonic())


def _parse_stdout(outcome: Outcome) -> Any:
    if not outcome.ok:
        return _NO_VALUE
    try:
        return parse_json(outcome.stdout)
    except (ValueError, RecursionError):
        return _NO_VALUE
