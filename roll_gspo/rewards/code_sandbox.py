"""`code_sandbox`: the share of a row's test cases that a model-written Python program passes, in a sandbox."""

from __future__ import annotations

import json
import math
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from roll_gspo.rewards.base import Verdict
from roll_gspo.rewards.code_cases import BadCasesError, CallCase, CodeCases, ScriptCase, parse_cases
from roll_gspo.sandbox import Limits, Outcome, Program, Sandbox

_THINKING_END = "</think>"
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#-]*)", re.MULTILINE)
_PYTHON = {"python", "python3", "py"}
_LEAST_S = 0.05


class CodeSandbox:
    """1 where the response's program passes all test cases of the row, else 0; or the share that it passes.

    The program is the last block fenced as Python after the last `</think>`, else the last fenced block. The shapes of
    test cases are those of `code_cases`. Programs run one process per case without network, files, other processes or
    environment; what they should print is known outside only. Tests that come as code run in a process of their own.

    Args:
        partial: score the share of passed cases; else all or nothing, and the first failure ends the sample.
        time_limit_s: seconds of a case by the clock, and of processor time.
        total_s: seconds of all cases of a sample; what has not run by then has failed. Keep it below `timeout_s` of
            the reward's block, at which the pool gives the sample up.
        memory_mb: MiB of a program.
        max_cases: use the first so many of a row; null: all.
        float_tolerance: absolute or relative, of numbers with a decimal point; 0: compared as numbers.
        allow_bare: where there is no fenced block, the whole response is the program.
        packages: installed packages that programs may import, e.g. [numpy]; the standard library they have.
        allow_unsafe: run programs without isolation where this host offers none, instead of refusing to start.
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
            raise ValueError(f"max_cases is {max_cases}; give 1 or more, or null for all")
        if total_s <= 0 or float_tolerance < 0:
            raise ValueError(f"total_s is {total_s:g}, float_tolerance {float_tolerance:g}; neither may be negative")
        self._partial, self._total_s = partial, total_s
        self._max_cases, self._tolerance, self._allow_bare = max_cases, float_tolerance, allow_bare
        limits = Limits(wall_s=time_limit_s, cpu_s=time_limit_s, memory_mb=memory_mb)
        self._sandbox = Sandbox(limits, packages, allow_unsafe)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        try:
            cases = parse_cases(row)[: self._max_cases]
        except BadCasesError as error:
            raise ValueError(f"code_sandbox: row '{row.get('id', '?')}': {error}") from None
        deadline = time.monotonic() + self._total_s
        if isinstance(cases[0], CodeCases):
            return self._examined(cases[0], response, deadline, row)
        source = extract_program(response, self._allow_bare)
        if source is None:
            return self._verdict([], len(cases), compiled=False)
        with self._sandbox.start(source) as program:
            passed: list[bool] = []
            while not program.problem and len(passed) < len(cases) and (self._partial or all(passed)):
                remaining = deadline - time.monotonic()
                if remaining < _LEAST_S:
                    break
                passed.append(self._passes(program, cases[len(passed)], remaining))
            return self._verdict(passed, len(cases), compiled=not program.problem)

    def _passes(self, program: Program, case: ScriptCase | CallCase | CodeCases, wall_s: float) -> bool:
        if isinstance(case, ScriptCase):
            outcome = program.run(case.stdin, wall_s)
            return outcome.ok and same_output(outcome.stdout, case.expected, self._tolerance)
        assert isinstance(case, CallCase)
        outcome = program.call(case.function, case.arguments, wall_s)
        value = _json(outcome)
        return value is not _NOTHING and any(same_value(value, wanted, self._tolerance) for wanted in case.expected)

    def _examined(self, cases: CodeCases, response: str, deadline: float, row: Mapping[str, Any]) -> Verdict:
        """Tests that are code; those of one row share their process, so one that hangs fails those after it, too."""
        sources = cases.sources[: self._max_cases]
        with self._sandbox.start("") as examiner:
            compiled = True
            if cases.about_text:
                text = response.rpartition(_THINKING_END)[2]
                texts = [source.replace("{response}", repr(text)) for source in sources]
                outcome = examiner.examine_alone(texts, max(_LEAST_S, deadline - time.monotonic()))
            else:
                source = extract_program(response, self._allow_bare)
                if source is None:
                    return self._verdict([], len(sources), compiled=False)
                with self._sandbox.start(cases.prefix + "\n" + source if cases.prefix else source) as program:
                    compiled = not program.problem
                    if not compiled:
                        return self._verdict([], len(sources), compiled=False)
                    wall_s = max(_LEAST_S, deadline - time.monotonic())
                    outcome = program.examine(examiner, sources, cases.entry_point, wall_s)
        result = _json(outcome)
        if not isinstance(result, dict):  # the tests hung, or used too much
            return self._verdict([], len(sources), compiled)
        if "malformed" in result:
            raise ValueError(f"code_sandbox: row '{row.get('id', '?')}': its test cases: {result['malformed']}")
        return self._verdict([bool(one) for one in result["passed"]], len(result["passed"]), compiled)

    def _verdict(self, passed: Sequence[bool], num_cases: int, compiled: bool) -> Verdict:
        share = sum(passed) / num_cases
        components = {"compiled": float(compiled), "all_passed": float(share == 1)}
        if self._partial:
            components["pass_rate"] = share
        return Verdict(share if self._partial else float(share == 1), components=components)


def extract_program(response: str, allow_bare: bool = False) -> str | None:
    """The last block fenced as Python after the last `</think>`, else the last fenced block, else None.

    Args:
        response: text of the model.
        allow_bare: without any block, take all of it.
    """
    answer = response.rpartition(_THINKING_END)[2]
    blocks = _blocks(answer)
    chosen = [text for language, text in blocks if language in _PYTHON] or [text for _, text in blocks]
    if chosen:
        return textwrap.dedent(chosen[-1])
    return answer if allow_bare and answer.strip() and "```" not in answer else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of closed fences. One expression for it all would take minutes on a page of backticks."""
    fences = list(_FENCE.finditer(text))
    blocks, begin = [], 0
    while begin < len(fences):
        later = range(begin + 1, len(fences))
        end = next((index for index in later if fences[index][1].startswith(fences[begin][1])), begin)
        if end > begin:
            content = text[text.index("\n", fences[begin].end()) + 1 : fences[end].start()]
            blocks.append((fences[begin][2].lower(), content))
        begin = end + 1
    return blocks


def same_output(actual: str, expected: str, tolerance: float) -> bool:
    """Whether two outputs have the same words; white space between them does not count.

    Args:
        tolerance: of numbers that are written with a point or an exponent on either side, absolute or relative.
    """
    given, wanted = actual.split(), expected.split()
    return len(given) == len(wanted) and all(
        a == b or _near(a, b, tolerance) for a, b in zip(given, wanted, strict=True)
    )


def same_value(actual: Any, expected: Any, tolerance: float) -> bool:
    """Whether two JSON values are the same, floats within `tolerance`, absolute or relative."""
    if isinstance(expected, list) and isinstance(actual, list):
        pairs = zip(actual, expected, strict=False)
        return len(actual) == len(expected) and all(same_value(a, b, tolerance) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(same_value(actual[k], expected[k], tolerance) for k in expected)
    if isinstance(expected, float) or isinstance(actual, float):
        if not isinstance(actual, int | float) or not isinstance(expected, int | float):
            return False
        try:
            return math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:  # a whole number beyond all floats
            return False
    return actual == expected


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOTHING = object()


def _near(actual: str, expected: str, tolerance: float) -> bool:
    if len(actual) > 400 or not (_NUMBER.fullmatch(actual) and _NUMBER.fullmatch(expected)):
        return False
    if not set(".eE") & (set(actual) | set(expected)):  # two whole numbers: to the digit
        return False
    return math.isclose(float(actual), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def _json(outcome: Outcome) -> Any:
    if not outcome.ok:
        return _NOTHING
    try:
        return json.loads(outcome.stdout)
    except (ValueError, RecursionError):
        return _NOTHING
