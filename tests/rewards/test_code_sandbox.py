"""`code_sandbox`: program extraction, formats of test cases, comparison of outputs, and attempts to cheat."""

from __future__ import annotations

import json

import pytest

from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
from roll_gspo.rewards.code_cases import CallCase, InvalidCasesError, StdinCase, UnitTests, parse_cases
from roll_gspo.rewards.code_sandbox import CodeSandbox, extract_program, same_output, same_value
from roll_gspo.sandbox import SandboxError

SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "-5 5\n", "output": "0\n"}, {"input": "7 8\n", "output": "15"}]
SUM = "print(sum(map(int, input().split())))"
LONG_LIMITS = {"time_limit_s": 60, "total_s": 60}


def make_reward(**arguments) -> CodeSandbox:
    try:
        return CodeSandbox(**{**LONG_LIMITS, **arguments})
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reward() -> CodeSandbox:
    return make_reward()


@pytest.fixture(scope="module")
def partial() -> CodeSandbox:
    return make_reward(partial=True)


def score(reward: CodeSandbox, source: str, test_cases, **row) -> float:
    return reward("", f"Here it is:\n```python\n{source}\n```", "", test_cases=test_cases, **row).score


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nand better\n```py\nb\n```\nprints\n```\n3\n```", "b\n"),
        ("~~~~python3 title\nx = '''```'''\n~~~~", "x = '''```'''\n"),
        ("1. so:\n   ```Python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("~~~\n```\na\n```", "a\n"),
        ("`" * 100_000 + "\n" + "b\n" * 10_000, None),  # such responses occur and must not backtrack
        ("```python\nprint(1)", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_program_is_the_last_python_block(response, program):
    assert extract_program(response) == program


def test_allow_bare_extracts_a_program_without_code_block():
    assert extract_program("print(1)", allow_bare=True) == "print(1)"
    assert extract_program("``` print(1)", allow_bare=True) is None


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3", "1 2 \n3\n\n", True), ("0.3333333", "0.33333333", True), ("1.0", "1", True), ("1e3", "1000.0", True),
        ("-0.0", "0.0", True), ("10000001", "10000002", False), ("0.34", "0.33", False), ("1 2", "1", False),
        ("998247000000000.0", "998247347994059", False), ("9e2", "900", True), ("1e999999999999999999999", "1", False),
        ("yes", "YES", False), ("nan", "nan", True), ("inf", "1e999", False), ("1_0", "10", False), ("", "", True),
    ],
)  # fmt: skip
def test_outputs_are_compared_word_by_word(actual, expected, same):
    assert same_output(actual, expected, 1e-6) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ([1, [2.0000000001]], [1, [2.0]], True), ({"a": 1}, {"a": 1.0}, True), ([1], [1, 2], False), ("1", 1, False),
        (None, [], False), ({"a": 1}, {"b": 1}, False), (10**17, 10**17 + 1, False), (True, True, True),
        (10**400, 1.5, False), (True, 1, False), (1, True, False), (1.0, 1, True), (1099511627000.5, 2**40, False),
        (3, 3.0, True), ([2, 1], {1, 2}, True), ([1], {1, 2}, False), (False, None, False),
    ],
)  # fmt: skip
def test_values_are_compared_recursively(actual, expected, same):
    assert same_value(actual, expected, 1e-6) is same


@pytest.mark.parametrize(
    ("row", "case"),
    [
        ({"case_type": "input", "test_cases": '[{"stdin": "1", "expected_stdout": "2"}]'}, StdinCase("1", "2")),
        ({"test_cases": SUMS}, StdinCase("1 2\n", "3\n")),
        ({"test_cases": [{"input": "1", "output": "2", "testtype": "stdin"}], "fn_name": "f"}, StdinCase("1", "2")),
        ({"test_cases": {"inputs": ["1"], "outputs": ["2"]}}, StdinCase("1", "2")),
        (
            {"test_cases": [{"assert_code": None, "input": "1", "output": "2", "stdin": None}], "fn_name": None},
            StdinCase("1", "2"),
        ),
        ({"test_cases": {"inputs": None, "stdin": "1", "expected_stdout": "2"}}, StdinCase("1", "2")),
        ({"test_cases": {"inputs": [["1", "2"]], "outputs": [["3"]]}}, StdinCase("1\n2", "3")),
        (
            {"test_cases": {"inputs": [[[1], 2]], "outputs": [[3]], "fn_name": "f"}},
            CallCase("f", [[1], 2], [[3], 3]),
        ),
        (
            {
                "test_cases": [{"input": '[1]\n"a"', "output": "true", "testtype": "functional"}],
                "metadata": '{"func_name": "f"}',
            },
            CallCase("f", [[1], "a"], ["true", True]),
        ),
        (
            {"case_type": "input", "test_case_function": "f", "test_cases": [{"stdin": "1", "expected_stdout": "x"}]},
            CallCase("f", [1], ["x"]),
        ),
        ({"case_type": "pytest", "test_cases": '[{"assert_code": "t"}]'}, UnitTests(("t",))),
        ({"case_type": "assert", "test_cases": "assert f() == 1"}, UnitTests(("assert f() == 1",))),
        (
            {"test_cases": [{"assert_code": "c", "entry_point": "f", "import_prefix": "import x"}]},
            UnitTests(("c",), "f", "import x"),
        ),
        ({"case_type": "text", "test_cases": [{"assert_code": "t"}]}, UnitTests(("t",), tests_text=True)),
    ],
)
def test_known_formats_of_test_cases_are_parsed(row, case):
    assert parse_cases(row)[0] == case


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "^test_cases is missing"),
        ({"test_cases": []}, "^test_cases is empty"),
        ({"test_cases": 3}, "^test_cases: .* 3"),
        ({"test_cases": "eJxrYJnKAwA="}, "^test_cases .*'eJxrYJnKAwA='"),
        ({"test_cases": [*SUMS, {"input": "1"}]}, r"^test_cases\[3\]: .*expected_stdout or output.* input"),
        ({"test_cases": SUMS, "case_type": "java"}, "^case_type 'java' .*input, stdin"),
        ({"test_cases": [{"input": "1", "output": "2", "testtype": "functional"}]}, r"^test_cases\[0\]: .*fn_name"),
        ({"test_cases": [{"input": "1 2", "output": "2"}], "fn_name": "f"}, r"^test_cases\[0\]: .*JSON.*'1 2'"),
        ({"test_cases": {"inputs": ["1"], "outputs": []}}, "^test_cases: .*inputs and outputs"),
        ({"test_cases": [{"assert_code": ""}], "case_type": "pytest"}, r"^test_cases\[0\]: .*assert_code"),
        ({"test_cases": [{"assert_code": "x = f'{response}'"}], "case_type": "text"}, r"^test_cases\[0\]: {response}"),
        ({"test_cases": ["check"], "case_type": "check_based"}, r"^test_cases\[0\]: .*entry_point"),
    ],
)
def test_invalid_test_cases_raise(row, match):
    with pytest.raises(InvalidCasesError, match=match):
        parse_cases(row)


def test_invalid_row_raises_with_its_id(reward):
    with pytest.raises(ValueError, match="code_sandbox: row 'r7': test_cases"):
        score(reward, SUM, [], id="r7")
    for source, error in (
        ("assert (", "SyntaxError"),
        ("import absent\nassert x == 1", "the tests import absent"),
        ("def test_it(absent): assert x == 1", "the fixture absent"),
        ("import pytest\n@pytest.mark.skip\ndef test_it(): assert x == 1", "marked as skipped"),
        ("def helper(): assert x == 1", "never call"),
    ):
        with pytest.raises(ValueError, match=f"row 'r8': test_cases: .*{error}"):
            score(reward, "x = 1", [source], case_type="assert", id="r8")
    with pytest.raises(ValueError, match=r"test_cases: .*check"):
        score(reward, "def f(): pass\ndef check(f): pass", [{"assert_code": "x = 1", "entry_point": "f"}])


def test_programs_score_0_or_1_or_the_fraction_of_passed_cases(reward, partial):
    wrong_once = "a, b = map(int, input().split())\nprint(a + b if a > 0 else 9)"
    assert (score(reward, SUM, SUMS), score(partial, SUM, SUMS)) == (1, 1)
    assert (score(reward, wrong_once, SUMS), score(partial, wrong_once, SUMS)) == (0, pytest.approx(2 / 3))
    output = partial("", f"```python\n{wrong_once}\n```", "", test_cases=SUMS)
    assert output.components == {"compiled": 1, "all_passed": 0, "pass_rate": pytest.approx(2 / 3)}
    assert reward("", "```python\ndef (\n```", "", test_cases=SUMS).components == {"compiled": 0, "all_passed": 0}
    assert reward("", "no program", "", test_cases=SUMS).score == 0


def test_function_calls_are_scored(reward, partial):
    row = {"fn_name": "f", "test_cases": [{"input": "[3, 1]", "output": "[1, 3]"}, {"input": "[]", "output": "[]"}]}
    solution = "class Solution:\n    def f(self, x: List[int]):\n        return sorted(x)"
    assert score(reward, solution, **row) == 1
    assert score(partial, "def f(x): return x[:1] and [1, 3]", **row) == 1
    assert score(partial, "def f(x): return [1, 3]", **row) == 0.5
    assert score(partial, "def g(x): return x", **row) == 0


@pytest.mark.parametrize(
    ("expected", "returned", "wrong"),
    [
        ("True", "True", "1"), ("true", "True", "'True '"), ("None", "None", "0"), ("(1, 'a')", "(1, 'a')", "(1, 'b')"),
        ("{1, 2}", "{2, 1}", "{2}"), ("{1: [True]}", "{1: (True,)}", "{1: (1,)}"), ("42", "'42'", "'43'"),
        ("9" * 5000, "10**5000 - 1", "10**5000"), ([str("1" * 4400)], "['1' * 4400]", "['1' * 4401]"),
    ],
)  # fmt: skip
def test_expected_texts_are_json_literals_or_the_value(partial, expected, returned, wrong):
    row = {"fn_name": "f", "test_cases": [{"input": "1", "output": expected}]}
    assert score(partial, f"def f(x): return {returned}", **row) == 1
    assert score(partial, f"def f(x): return {wrong}", **row) == 0


def test_large_integers_are_passed_to_calls(reward):
    row = {"fn_name": "f", "test_cases": [{"input": "1" + "0" * 5000, "output": "5001"}]}
    assert score(reward, "def f(x): return len(str(x))", **row) == 1


FACTORIAL = (
    {"fn_name": "factorial", "test_cases": [{"input": "5", "output": "120"}]},
    {"case_type": "assert", "test_cases": ["assert factorial(5) == 120"]},
    {"test_cases": [{"assert_code": "def check(f):\n    assert f(5) == 120", "entry_point": "factorial"}]},
)


@pytest.mark.parametrize("row", FACTORIAL)
def test_preimported_names_do_not_count_as_the_solution(reward, row):
    assert score(reward, "x = factorial(3)", **row) == 0
    assert score(reward, "from math import factorial", **row) == 1
    assert score(reward, "def factorial(n): return 24 * n", **row) == 1


def test_program_may_shadow_builtins_and_modules(reward):
    solution = "class Solution:\n    def search(self, nums, target): return nums.index(target)"
    assert score(reward, solution, [{"input": "[4, 5]\n5", "output": "1"}], fn_name="search") == 1
    addition = "result = 0\ndef sum(a, b): return a + b"
    assert score(reward, addition, ["result = sum(1, 2)\nassert result == 3"], case_type="assert") == 1
    tests = "from solution import sum\ndef test_it(): assert sum(1, 2) == 3"
    assert score(reward, addition, [tests], case_type="pytest") == 1


ROLL_ROW = {
    "case_type": "pytest",
    "test_cases": json.dumps(
        [
            {
                "assert_code": "\n\n\ndef test_one():\n    assert permute([1]) == [[1]]\n\ndef test_two():\n"
                "    result = permute([1, 2])\n    expected = [[1, 2], [2, 1]]\n"
                "    assert sorted(result) == sorted(expected)"
            }
        ]
    ),
}
PERMUTE = "def permute(nums):\n    return [list(p) for p in permutations(nums)]"


def test_each_test_function_counts_as_a_case(reward, partial):
    assert (score(reward, PERMUTE, **ROLL_ROW), score(partial, PERMUTE, **ROLL_ROW)) == (1, 1)
    assert score(partial, "def permute(nums):\n    return [nums]", **ROLL_ROW) == 0.5
    assert score(partial, "1 / 0", **ROLL_ROW) == 0
    assert score(partial, "def other(): pass", **ROLL_ROW) == 0


UNIT_TESTS = """
import asyncio
import pytest
from solution import Account, Broke, Vector, double, sort_in_place, each, counted, later, numbers

def test_argument_is_changed_in_place():
    xs = [3, 1]
    assert sort_in_place(xs) is xs and xs == [1, 3]

def test_classes_and_errors():
    account = Account(5)
    account.owner = "me"
    assert isinstance(account, Account) and account.owner == "me"
    with pytest.raises(Broke, match="short of 2") as caught:
        account.spend(7)
    assert caught.value.missing == 2 and issubclass(Broke, ValueError)

def test_arithmetic():
    assert abs(Vector(3, 4)) == 5 and (Vector(3, 4) * 2).xs == (6, 8) and Vector(1, 2) @ Vector(3, 4) == 11

def test_functions_go_both_ways():
    assert each(lambda x: x * 2, [1, 2]) == [2, 4]
    @counted
    def f(x): return x
    assert f(1) == (1, 1) and f(2) == (2, 2)

@pytest.mark.parametrize("value, expected", [(1, 2), (0.1, pytest.approx(0.2)), ("a", "aa"), ((1,), (1, 1))])
def test_values(value, expected):
    assert double(value) == expected

@pytest.fixture
def three(): yield 3

class TestMore:
    def setup_method(self): self.base = 1
    def test_fixture(self, three): assert list(numbers(three)) == [self.base - 1, 1, 2]
    async def test_async(self): assert await later(3) == 3
"""
SOLUTION = """
class Broke(ValueError):
    def __init__(self, missing):
        super().__init__(f"short of {missing}")
        self.missing = missing
class Vector:
    def __init__(self, *xs): self.xs = xs
    def __mul__(self, by): return Vector(*(x * by for x in self.xs))
    def __matmul__(self, other): return sum(map(operator.mul, self.xs, other.xs))
    def __abs__(self): return (self @ self) ** 0.5
class Account:
    def __init__(self, sum): self.sum = sum
    def __eq__(self, other): return self.sum == other.sum
    def spend(self, sum):
        if sum > self.sum: raise Broke(sum - self.sum)
def sort_in_place(xs): xs.sort(); return xs
def each(f, xs): return [f(x) for x in xs]
def counted(f):
    calls = 0
    def g(*args):
        nonlocal calls
        calls += 1
        return f(*args), calls
    return g
def double(x): return x + x
def numbers(n): yield from range(n)
async def later(x): return x
"""


def test_unit_tests_can_use_objects_of_the_program(reward):
    assert score(reward, SOLUTION, [UNIT_TESTS], case_type="pytest") == 1
    broken = SOLUTION.replace("xs.sort()", "pass")
    assert score(reward, broken, [UNIT_TESTS], case_type="pytest") == 0


def test_check_based_and_text_cases_are_scored(reward):
    check = {
        "assert_code": "def check(candidate):\n    assert candidate(2) == 4",
        "entry_point": "f",
        "import_prefix": "two = 2",
    }
    assert score(reward, "def f(x): return x * two", [check], case_type="check_based") == 1
    assert score(reward, "def f(x): return x", [check], case_type="check_based") == 0
    text = [{"assert_code": "answer = {response}\nassert len(answer.split()) == 2"}]
    assert reward("", "<think>no</think>it's \"two\\'", "", test_cases=text, case_type="text").score == 1
    assert reward("", "one", "", test_cases=text, case_type="text").score == 0


EQUAL = (
    "class E:\n    def __eq__(self, o): return True\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n"
    "    def __ne__(self, o): return False\n"
)
FORGED = {
    "prints a passing result": "print('{\"passed\": [true, true], \"reason\": \"\"}')\nprint('All tests passed!')",
    "exits": "import sys\nsys.exit(0)",
    "exits without cleanup": "import os\nos._exit(0)",
    "exits when called": "import os\ndef permute(x): os._exit(0)",
    "raises SystemExit when called": "def permute(x): raise SystemExit(0)",
    "equals everything": EQUAL + "def permute(x): return E()",
    "equals everything in a list": EQUAL + "def permute(x): return [E()] * 2",
    "equals everything as a list": "class E(list):\n    def __eq__(self, o): return True\ndef permute(x): return E()",
    "patches builtins": "import builtins\nbuiltins.sorted = lambda x: 0\nbuiltins.AssertionError = ValueError\n"
    "builtins.all = builtins.any = lambda x: True\ndef permute(x): return []",
    "patches pytest": "import sys, types\nsys.modules['pytest'] = types.ModuleType('pytest')\ndef permute(x): return 0",
    "patches json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": [true, true]}'\ndef permute(x): return 0",
    "writes to every descriptor": "import os\nfor fd in range(200):\n"
    "    try: os.write(fd, b'{\"passed\": [true, true]}')\n    except OSError: pass\ndef permute(x): return 0",
    "inspects the frames of the tests": "import sys\ndef permute(x):\n    f = sys._getframe()\n    while f:\n"
    "        if 'expected' in f.f_locals: return f.f_locals['expected']\n        f = f.f_back\n    return 0",
    "loops forever": "def permute(x):\n    while True: pass",
    "closes its connection": "import os\nos.closerange(0, 200)\ndef permute(x): return 0",
    "kills processes": "import os\nos.kill(-1, 9)\nos.kill(1, 9)\ndef permute(x): return 0",
    "returns a class": "class permute(int):\n    __name__ = 'x'\n    def __new__(cls, x): return True",
}  # fmt: skip


@pytest.mark.parametrize("trick", FORGED)
def test_result_cannot_be_forged(partial, trick):
    row = {**ROLL_ROW, "test_cases": json.loads(ROLL_ROW["test_cases"])}
    if trick == "loops forever":
        short = make_reward(time_limit_s=0.5, total_s=0.5)
        assert score(short, FORGED[trick], **row) == 0
        return
    assert score(partial, FORGED[trick], **row) == 0
    assert score(partial, FORGED[trick], SUMS) == 0
    assert score(partial, FORGED[trick], [{"input": "[1]", "output": "[[1]]"}], fn_name="permute") == 0


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def f(x): return 0\ndef all(_): return True", "assert all(f(x) == x for x in (1, 2))"),
        ("def f(x): return 0\ndef sorted(_): return []", "from solution import *\nassert sorted(f(2)) == sorted([2])"),
        ("def f(x): return 0\nclass math: isclose = lambda *_: True", "assert math.isclose(f(2), 1.4)"),
        ("class W:\n    __sub__ = lambda *_: 0\nf = lambda x: W()", "assert abs(f(2) - 1.4) < 1e-6"),
        (
            "class W:\n    __abs__ = lambda s: 0\n    __sub__ = lambda s, o: s\nf = lambda x: W()",
            "assert abs(f(2) - 1.4) < 1",
        ),
        ("class W:\n    __mul__ = lambda *_: 4\nf = lambda x: W()", "assert f(2) * 2 == 4"),
    ],
)
def test_program_cannot_replace_builtins_and_modules_of_the_tests(reward, source, tests):
    assert score(reward, source, [tests], case_type="assert") == 0


def test_callbacks_of_the_tests_expose_no_internals_to_the_program(reward):
    tests = "secret = 42\nclass Thing:\n    hidden = 1\n    def show(self): return 'shown'\n"
    tests += "def test_it():\n    assert spy(lambda: secret, Thing()) == ['shown']\n"
    spy = (
        "def spy(f, thing):\n    seen = []\n"
        "    for look in (lambda: f.__globals__, lambda: f.gi_frame, lambda: f.__code__, lambda: thing.__class__,\n"
        "                 lambda: thing.__dict__, lambda: thing.show.__func__, lambda: thing.show()):\n"
        "        try: seen.append(look())\n"
        "        except AttributeError: pass\n    return [s for s in seen if isinstance(s, (str, dict))]\n"
    )
    assert score(reward, spy, [tests], case_type="pytest") == 1


def test_sample_ends_within_total_s():
    short = make_reward(partial=True, time_limit_s=0.3, total_s=0.7)
    assert score(short, "while True: pass", [{"input": "", "output": ""}] * 100) == 0
    with pytest.raises(ValueError, match="total_s is 0"):
        CodeSandbox(total_s=0)


def test_max_cases_uses_the_first_cases(reward):
    first = make_reward(max_cases=1)
    assert (score(first, "print(3)", SUMS), score(reward, "print(3)", SUMS)) == (1, 0)
    with pytest.raises(ValueError, match="max_cases is 0"):
        CodeSandbox(max_cases=0)


def test_pool_scores_programs(reward):
    spec = reward_spec("code_sandbox", {**LONG_LIMITS, "partial": True}, "rewards.code")
    sources = [SUM, "import os\nos.kill(-1, 9)", "print(3)"]
    requests = [
        RewardRequest("", f"```python\n{s}\n```", "", {"id": str(i), "test_cases": SUMS}) for i, s in enumerate(sources)
    ]
    with RewardPool(spec, 1, 60.0, "rewards.code") as pool:
        results = pool.score([*requests, RewardRequest("", "x", "", {"id": "bad"})])
    assert [result.score for result in results] == [1, 0, pytest.approx(1 / 3), 0]
    assert (results[3].failed or "").startswith("ValueError: code_sandbox: row 'bad': test_cases ")
