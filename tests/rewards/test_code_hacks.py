"""`code_sandbox`: programs that pass tests without solving the task, and honest programs that use the same features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from code_hacks import HACKS
from honest_programs import HONEST

from roll_gspo.rewards.code_sandbox import CodeSandbox
from roll_gspo.sandbox import SandboxError

# Objects that answer every question as asked.
YES = """
class Yes:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return self
    def __getattr__(self, name): return lambda *a, **k: True
    def __bool__(self): return True
    def __len__(self): return 2
    def __iter__(self): return iter([1, 2])
    def __contains__(self, x): return True
    def __eq__(self, o): return True
    def __ne__(self, o): return True
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __hash__(self): return 0
    def __sub__(self, o): return Zero()
    __add__ = __mul__ = __truediv__ = __mod__ = __and__ = __or__ = __xor__ = __pow__ = __divmod__ = __sub__
    __rsub__ = __radd__ = __rand__ = __rxor__ = __isub__ = __iand__ = __sub__
    def __getitem__(self, i): return self
    def __enter__(self): return self
    def __exit__(self, *a): return True
    async def __aenter__(self): return self
    async def __aexit__(self, *a): return True
    def __await__(self):
        yield from ()
        return True
    def __float__(self): return 3.0
    def __int__(self): return 3
    __index__ = __int__
    def __round__(self, *a): return 3
    def __str__(self): return 'x'
    def __array__(self, *a, **k):
        import numpy
        return numpy.zeros(2)
class Zero(Yes):
    def __bool__(self): return False
    def __len__(self): return 0
    def __float__(self): return 0.0
    def __int__(self): return 0
    def __abs__(self): return self
    def __getattr__(self, name): return lambda *a, **k: 0
    __neg__ = __abs__
"""
# Assertions that hold for a right value; the program returns a `Yes` (or `Zero`) instead.
QUESTIONS = [
    *("f(2) == 3", "3 == f(2)", "f(2) != 4", "not f(2) == 4", "f(2) > 2", "2 < f(2) <= 3", "f(2)", "bool(f(2))"),
    *("abs(f(2) - 3) < 1e-9", "math.fabs(f(2) - 3) < 1e-9", "math.isclose(f(2), 3)", "math.isclose(f(2) / 3, 1)"),
    *(
        "float(f(2)) == 3.0",
        "int(f(2) - 3) == 0",
        "float(f(2) - 3.0) == 0",
        "round(f(2), 1) == 3.0",
        "abs(3 - f(2)) < 1",
    ),
    *("pytest.approx(3) == f(2)", "f(2) == pytest.approx(3)", "f(2).startswith('x')", "f(2).isupper()"),
    *("f(2).issubset({1})", "f(2).endswith('b') and f(2).islower()", "3 in f(2)", "1 in f(2) and 2 in f(2)"),
    *(
        "len(f(2) - {3}) == 0",
        "not f(2) ^ {3}",
        "not f(2).difference({3})",
        "set(f(2)) == {1, 2}",
        "list(f(2) & {1}) == []",
    ),
    *("sorted(f(2)) == [1, 2]", "all(x == y for x, y in zip(f(2), [1, 2]))", "[*f(2)] == [1, 2]", "max(f(2), 1) == 3"),
    *("f(2)[0] == 3", "f(2)['a'] == 1", "str(f(2)) == 'x'", "f'{f(2)}' == 'x'", "'%s' % f(2) == 'x'", "len(f(2)) == 2"),
    *("{f(2): 1}[3] == 1", "[1, 2, 3].index(f(2)) == 2", "[3].count(f(2)) == 1", "f(2) in [3]", "(f(2),) == (3,)"),
    *(
        "{'a': f(2)} == {'a': 3}",
        "range(3).index(f(2)) == 2",
        "[0, 1, 2, 3][f(2)] == 3",
        "f(2) % 2 == 1",
        "sum([f(2)]) == 3",
    ),
    *("(f(2) - 3).total_seconds() == 0", "(f(2) - datetime(2020, 1, 1)) < timedelta(1)", "divmod(f(2), 2) == (1, 1)"),
    *(
        "f(2) == f(2)",
        "f(1) != f(2)",
        "f(2) <= f(2)",
        "f(2).equals(3)",
        "all([f(2)])",
        "any([f(2)])",
        "pow(f(2), 2) == 9",
    ),
    *(
        "np.allclose(f(2), [0, 0])",
        "np.array_equal(f(2), [0, 0])",
        "(np.array([0, 0]) == f(2)).all()",
        "np.isclose(f(2), 0)",
    ),
    *("operator.eq(f(2), 3)", "operator.truth(f(2))", "functools.reduce(operator.add, [f(2)], 0) == 3", "-f(2) == -3"),
    *("Fraction(f(2)) == 3", "complex(f(2)) == 3", "bytes(f(2)) == b''", "next(f(2)) == 1", "dict(f(2)) == {}"),
    *("True if f(2) else False", "f(2) and True", "not (not f(2))", "3 == f(2) or False", "isinstance(f(2), int)"),
    *(
        "json.dumps(f(2)) == '3'",
        "'ab'.startswith(f(2))",
        "'-'.join(f(2)) == '1-2'",
        "hash(f(2)) == hash(3)",
        "f(2) is 3",
    ),
]
OBJECTS = {
    "yes": "f = Yes()",
    "yes from a function": "def f(x): return Yes()",
    "zero": "def f(x): return Zero()",
    "a coroutine": "async def f(x): return 0",
    "an awaitable": "class f(Yes): pass",
    "a generator": "def f(x): yield 0",
    "a function": "def f(x): return lambda *a: True",
    "a list of yes": "def f(x): return [Yes(), Yes()]",
    "a subclass of int": "class I(Yes, int): pass\ndef f(x): return I()",
    "a subclass of str": "class S(Yes, str): pass\ndef f(x): return S('q')",
    "a subclass of list": "class L(Yes, list): pass\ndef f(x): return L()",
    "an exception": "class E(Yes, Exception): pass\ndef f(x): return E()",
    "a class": "class M(type):\n    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = lambda *a: True\n"
    "    __bool__ = lambda s: True\n    __hash__ = lambda s: 0\n    __contains__ = lambda *a: True\n"
    "    startswith = endswith = issubset = equals = isupper = lambda *a: True\n"
    "class K(metaclass=M): pass\ndef f(x): return K",
    "an enumeration": "import enum\nclass C(enum.Enum):\n    A = 1\n    __eq__ = lambda *a: True\n    __hash__ = None\n"
    "def f(x): return C.A",
    "a record": "from dataclasses import dataclass\n@dataclass\nclass R:\n    pass\ndef f(x): return R()",
    "a named tuple": "from collections import namedtuple\nclass T(namedtuple('T', 'a')):\n"
    "    __eq__ = lambda *a: True\n    __hash__ = None\ndef f(x): return T(7)",
}
# Kinds that are data to the tests, and assertions that hold for some data of these kinds.
DATA = ("a list of yes", "an enumeration", "a record", "a named tuple")
WEAK = {
    *("f(2) != 4", "not f(2) == 4", "f(2)", "bool(f(2))", "f(2) == f(2)", "f(2) <= f(2)", "any([f(2)])", "all([f(2)])"),
    *("operator.truth(f(2))", "True if f(2) else False", "f(2) and True", "not (not f(2))", "len(f(2)) == 2"),
}
PRELUDE = "import math, operator, functools, json, pytest\nimport numpy as np\nfrom fractions import Fraction\n"
PRELUDE += "from datetime import datetime, timedelta\nfrom solution import f\n"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeSandbox]:
    try:
        yield CodeSandbox(partial=True, time_limit_s=60, total_s=60, packages=["numpy"])
    except SandboxError as error:
        pytest.skip(str(error))


def score(reward: CodeSandbox, source: str, kind: str, tests: list) -> float:
    row = {"test_cases": tests, "case_type": {"call": "functional", "check": "check_based"}.get(kind, kind)}
    return reward(
        "", f"```python\n{source}\n```", "", id="r", **row, **({"fn_name": "f"} if kind == "call" else {})
    ).score


def questions(chosen: Iterable[str]) -> list[str]:
    tests = (f"def test_{i}():\n    assert {question}\n" for i, question in enumerate(chosen))
    return [PRELUDE + "".join(tests)]


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_the_program_answer_no_questions(reward, kind):
    chosen = [question for question in QUESTIONS if kind not in DATA or question not in WEAK]
    assert score(reward, YES + OBJECTS[kind], "pytest", questions(chosen)) == 0


def test_data_of_the_program_answers_questions(reward):
    assert score(reward, "f = lambda x: x + 1", "pytest", questions(QUESTIONS[:12])) == 1
    assert score(reward, "f = lambda x: x", "pytest", questions(["f(2) == 3", "f(2) == 2", "f(1) != f(2)"])) == 2 / 3


@pytest.mark.parametrize("name", HACKS)
def test_hack_scores_zero(reward, name):
    kind, tests, source = HACKS[name]
    assert score(reward, source, kind, tests) == 0


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_scores_one(reward, name):
    source, tests = HONEST[name]
    if isinstance(tests, tuple):
        code, function = tests
        assert score(reward, source, "check", [{"assert_code": code, "entry_point": function}]) == 1
    else:
        assert score(reward, source, "pytest", [tests]) == 1
