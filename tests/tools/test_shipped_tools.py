"""The calculator, the Python tool and the search, also with hostile inputs."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_gspo.errors import ConfigError
from roll_gspo.tools.calculator import calculate
from roll_gspo.tools.python_code import PythonCode
from roll_gspo.tools.search import Search
from roll_gspo.tools.tool import ToolError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("347+86", "433"),
        ("(3 + 4.5) * 2^10", "7680"),
        ("0.1 + 0.2", "0.3"),
        ("7 // 2 + 7 % 2 - -1", "5"),
        ("12 × 3 ÷ 4 − 1", "8"),
        ("2**-1", "0.5"),
        ("1^9999", "1"),
        ("sqrt(2) * sqrt(2)", "2"),
        ("factorial(20) / comb(5, 2)", "2.43290200818e+17"),
        ("round(2/3, 2)", "0.67"),
        ("max(1, 2) + pi", "5.14159265359"),
        ("3^500", str(3**500)),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9^9^9", "9\\^387420489 is too large"),
        ("2^100000", "too large"),
        ("factorial(100000)", "factorial takes numbers up to 1000"),
        ("factorial(1000)", "too many digits"),
        ("round(1, -10^9)", "round takes numbers up to 1000"),
        ("10.0^400", "Result too large|out of range"),
        ("1/0", "division by zero"),
        ("sqrt(-1)", "math domain error|nonnegative"),
        ("(-8)^0.5", "no real number"),
        ("1e308*10", "not finite"),
        ("__import__('os').system('id')", "something else"),
        ("(1).__class__", "something else"),
        ("[1 for _ in range(9)]", "something else"),
        ("'a' * 10^9", "something else"),
        ("open('x')", "something else"),
        ("abs(x=1)", "something else"),
        ("quit()", "no function 'quit'"),
        ("x := 3", "no arithmetic expression"),
        ("", "no arithmetic expression"),
        ("1\x00", "no arithmetic expression"),
        ("(" * 250 + "1" + ")" * 49, "no arithmetic expression"),
        ("-" * 299 + "1", "nested too deeply"),
        ("1+" * 200 + "1", "401 characters"),
        ("min()", "at least 1 argument"),
        ("True + 1", "something else"),
    ],
)
def test_calculator_refuses(expression: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        calculate(expression)


@given(st.text(st.sampled_from("0123456789.+-*/%^()e, ") | st.characters(), max_size=30))
@settings(max_examples=200, deadline=None)
def test_calculator_answers_any_text(text: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(calculate(text), str)


@pytest.fixture(scope="module")
def python() -> Iterator[PythonCode]:
    yield PythonCode(time_limit_s=2.0, memory_mb=256, output_kb=4)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(1)\n2 + 3", "1\n5"),
        ("x = 3", "(no output)"),
        ("None", "(no output)"),
        ("'a'", "'a'"),
        ("", "(no output)"),
        ("def f(n):\n    return n and n + f(n - 1)\nf(3)", "6"),
        ("import math\nmath.comb(5, 2)", "10"),
        ("exit()", "(no output)"),
        ("__name__", "'__main__'"),
    ],
)
def test_python(python: PythonCode, code: str, output: str) -> None:
    assert python(code) == output


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('before')\n1 / 0", r"(?s)^before\n.*line 2.*1 / 0.*ZeroDivisionError: division by zero$"),
        ("x = (", r"(?s)^File \"<code>\", line 1.*SyntaxError"),
        ("while True: pass", "timeout"),
        ("print('x' * 10_000_000)", "output limit exceeded"),
        ("a = 'x' * (1 << 30)", "MemoryError"),
        ("open('/etc/passwd')", "FileNotFoundError|PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80), 1)", "Error"),
        ("import os; os.fork()", "Error"),
        ("raise SystemExit(3)", "exit code 3"),
        ("(" * 100_000, "Error|output limit exceeded"),
    ],
)
def test_python_reports_errors(python: PythonCode, code: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        python(code)
    assert python("1") == "1"


def test_programs_run_at_the_same_time(python: PythonCode) -> None:
    values: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda number=number: values.update({number: python(f"{number}**2")}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {number: str(number**2) for number in range(6)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    entries = [
        {"title": "Bern", "text": "Bern is the capital of Switzerland."},
        {"id": 7, "contents": "Zürich has the largest airport of the country. " * 40},
    ]
    (folder / "cities.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    (folder / "rivers.txt").write_text("The Aare flows through Bern.\n\nThe Rhine is longer.\n")
    (folder / "ignored.csv").write_text("capital,capital\n")
    return folder


def test_search_finds_the_best_documents(corpus: Path) -> None:
    search = Search(str(corpus), num_results=2, max_chars=40)
    assert search("capital") == "[1] Bern\nBern is the capital of Switzerland."
    assert search("What flows through Bern?") == (
        "[1] rivers\nThe Aare flows through Bern.\n\n[2] Bern\nBern is the capital of Switzerland."
    )
    assert search("zurich airports") == "[1] 7\nZürich has the largest airport of the co..."
    assert search("volcano") == "no document has any of these words"


@pytest.mark.parametrize(
    "query",
    ['"', "a OR", "NEAR(bern, 2)", "title:bern", "bern*", "-bern ^bern", "'); DROP TABLE documents; --", "\x00x"],
)
def test_search_reads_any_query_as_words(corpus: Path, query: str) -> None:
    search = Search([str(corpus / "cities.jsonl")])
    if query == '"':
        with pytest.raises(ValueError, match="no words"):
            search(query)
    else:
        assert isinstance(search(query), str)
    assert search("capital").startswith("[1] Bern")


def test_searches_run_in_threads(corpus: Path) -> None:
    search = Search(str(corpus))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(search("capital"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [search("capital")] * 8


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"title": "x"}', r"a\.jsonl:1: no text"),
        ("a.jsonl", '{"text": "x"}\n{', r"a\.jsonl:2: invalid JSON"),
        ("a.txt", "\n\n", "has no document"),
        ("a.csv", "x", "is no folder and no .jsonl, .txt or .md file"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_wrong_corpus_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Search(str(tmp_path / name))
