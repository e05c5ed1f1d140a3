"""`python -m roll_gspo.data check`: problems by line, statistics, and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from roll_gspo.data.__main__ import main
from roll_gspo.data.rows import read_rows
from roll_gspo.models.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
GOOD = {"id": "1", "prompt": "1+1?", "ground_truth": "2", "domain": "math", "tag": "sums"}


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def findings_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Return the places of each kind of finding, in the order of the report."""
    main(["check", "--json", *arguments])
    files = json.loads(capsys.readouterr().out)["files"]
    return {f["kind"]: [p["place"].rpartition("/")[2] for p in f["first"]] for file in files for f in file["findings"]}


def test_valid_file_passes_with_statistics(tmp_path, capsys):
    second = {**GOOD, "id": "2", "prompt": "What is 2+2?", "tag": "", "test_cases": "", "source": "mine"}
    assert main(["check", write(tmp_path, GOOD, second)]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl: 2 rows, 0 errors, 0 warnings\n  columns  id (text), prompt (text)" in out
    assert "test_cases (text, 1 rows)" in out and "  domains  math 2\n" in out and "sums 1, (none) 1" in out
    assert "  sources  rows 1, mine 1\n" in out and "characters: min 4, median 4, p95 12, max 12" in out
    assert out.endswith("2 usable rows\n")


def test_every_problem_is_listed_with_line_and_fix(tmp_path, capsys):
    rows = (
        *(GOOD, '{"prompt": "x"', {"prompt": "a"}, {"tag": "t"}, [1]),
        {"messages": [{"role": "bot", "content": "x"}, {"role": "user", "content": 3}], "ground_truth": "1"},
        *({"prompt": "b", "answer": ""}, {**GOOD, "prompt": "c"}, {**GOOD, "id": "9", "prompt": " 1+1? "}),
        *({"prompt": "d", "answer": "1", "test_cases": "{'a'"}, {"prompt": "e", "answer": "1", "test_cases": 3}),
        {"prompt": "f", "answer": "1", "test_cases": "[]"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": " "}], "answer": "1"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}], "answer": "1"},
        *({"prompt": "g\ud83d", "answer": "1"}, {"prompt": "h", "answer": "1", "tools": ["search"]}),
    )
    path = write(tmp_path, *rows)
    assert findings_of(capsys, path) == {
        "not valid JSON": ["rows.jsonl:2"],
        "no answer": ["rows.jsonl:3", "rows.jsonl:4"],
        "no prompt": ["rows.jsonl:4"],
        "not a JSON object": ["rows.jsonl:5"],
        "messages: unknown role 'bot'": ["rows.jsonl:6"],
        "messages: content is not a string": ["rows.jsonl:6"],
        "test_cases is not JSON": ["rows.jsonl:10", "rows.jsonl:11"],
        "conversation ends with the assistant": ["rows.jsonl:14"],
        "messages: lone surrogate": ["rows.jsonl:15"],
        "tools: not a list of functions": ["rows.jsonl:16"],
        "empty ground truth": ["rows.jsonl:7"],
        "duplicate id": ["rows.jsonl:8"],
        "duplicate prompt": ["rows.jsonl:9"],
        "test_cases is empty": ["rows.jsonl:12"],
        "empty message": ["rows.jsonl:13"],
        "rows of several formats": ["rows.jsonl:1", "rows.jsonl:7", "rows.jsonl:13"],
    }
    assert main(["check", path]) == 1
    out = capsys.readouterr().out
    assert "rows.jsonl: 16 rows (8 usable), 12 errors, 8 warnings\n" in out
    assert "  error: no answer (2 rows); add ground_truth" in out
    assert f"    line 9: same prompt as {path}:1\n" in out and "\n12 errors: " in out


def test_only_the_first_places_of_a_finding_are_printed(tmp_path, capsys):
    assert main(["check", write(tmp_path, *["{"] * 400)]) == 1
    out = capsys.readouterr().out
    assert "error: not valid JSON (400 rows)" in out and out.count("    line ") == 5 and "... and 395 more" in out


def test_strict_fails_on_warnings(tmp_path, capsys):
    path = write(tmp_path, {**GOOD, "ground_truth": ""})
    assert main(["check", path]) == 0
    assert main(["check", "--strict", path]) == 1
    assert "1 usable rows, 1 warnings" in capsys.readouterr().out


def test_prompt_shared_with_other_files_is_an_error(tmp_path, capsys):
    system = {"role": "system", "content": "Think."}
    train = write(tmp_path, GOOD, {**GOOD, "id": "2", "prompt": "2+2?"}, name="train.jsonl")
    test = write(
        tmp_path, {"messages": [system, {"role": "user", "content": "1+1?\n"}], "answer": "2"}, "{", name="test.jsonl"
    )
    assert findings_of(capsys, train, "--against", test) == {"prompt shared with --against": ["train.jsonl:1"]}
    assert main(["check", train, "--against", test]) == 1
    assert f"line 1: same prompt as {test}:1" in capsys.readouterr().out


def test_conversations_with_equal_last_messages_are_not_duplicates(tmp_path, capsys):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": [*turns, {"role": "user", "content": "Sure?"}], "answer": "2"}]
    rows.append({"messages": [{**turns[0], "content": "2+2?"}, *rows[0]["messages"][1:]], "answer": "4"})
    train, test = write(tmp_path, rows[0], name="train.jsonl"), write(tmp_path, rows[1], name="test.jsonl")
    assert findings_of(capsys, train, "--against", test) == {}
    assert "duplicate prompt" not in findings_of(capsys, train, test)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "error: no rows"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b'{"prompt": "\xff"}', "byte 0xff at position 13"),
        (None, "no such file"),
    ],
)
def test_unreadable_file_is_an_error_and_other_files_are_checked(tmp_path, capsys, content, text):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_bytes(content)
    assert main(["check", str(bad), write(tmp_path, GOOD)]) == 1
    out = capsys.readouterr().out
    assert text in out and "rows.jsonl: 1 rows, 0 errors" in out


def test_tokens_are_counted_with_the_chat_template(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    path, model = write(tmp_path, GOOD), str(tmp_path / "model")
    assert main(["check", path, "--tokenizer", model]) == 0
    length = len(
        tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], add_generation_prompt=True)["input_ids"]
    )
    assert f"prompt tokens: min {length}, " in capsys.readouterr().out
    assert main(["check", path, "--tokenizer", model, "--template", "plain"]) == 0
    assert "prompt tokens: min 4, " in capsys.readouterr().out
    assert main(["check", path, "--tokenizer", model, "--template", "chatml"]) == 2
    assert main(["check", path, "--tokenizer", str(tmp_path)]) == 2
    assert f"--tokenizer: {tmp_path} " in capsys.readouterr().err


def test_column_names_are_options(tmp_path, capsys):
    path = write(tmp_path, {"problem": "1+1?", "solution": "2", "kind": "sums"})
    assert main(["check", path]) == 1
    assert main(["check", path, "--prompt", "problem", "--ground_truth", "solution", "--tag", "kind"]) == 0
    assert "tags     sums 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        {"key": 1, "prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}]},
        {"question": "x", "answer": None, "test_cases": [{"stdin": "1", "assert_code": None}]},
        {"messages": None, "prompt": [{"role": "user", "content": "x", "name": None}], "ground_truth": 0},
        {"prompt": "x", "reward_model": {"ground_truth": "1"}, "data_source": None, "id": None},
    ],
)
def test_rows_that_a_run_accepts_have_no_findings(tmp_path, capsys, row):
    path = write(tmp_path, row)
    assert len(read_rows([path], "FILE")) == 1
    assert main(["check", "--strict", path]) == 0
    assert "1 rows, 0 errors, 0 warnings" in capsys.readouterr().out


def test_answers_at_the_end_are_errors_or_dropped(tmp_path, capsys):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path, {"messages": turns, "answer": "2"})
    assert main(["check", path]) == 1
    assert main(["check", path, "--drop_last_answer"]) == 0
    assert "set data_args.drop_last_answer: true" in capsys.readouterr().out


def test_control_characters_of_the_data_are_escaped(tmp_path, capsys):
    labels = {"id": "\x1b[2J", "domain": "a\x1b[31mb\u202e", "tag": "t\r\n", "source": "\x07"}
    row = {"prompt": "1+1?", "ground_truth": "2", **labels, "\x1b]0;title\x07": 1}
    main(["check", write(tmp_path, row, {**row, "prompt": "2+2?"}, {**row, "prompt": 3})])
    out = capsys.readouterr().out
    for escaped in (r"id '\x1b[2J' is also", r"a\x1b[31mb\u202e 2", r"t\r\n 2", r"\x1b]0;title\x07"):
        assert escaped in out
    assert not [c for c in out if c != "\n" and not c.isprintable()]


def test_parts_that_the_template_drops_are_errors(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = write(tmp_path, {**GOOD, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert main(["check", path, "--tokenizer", str(tmp_path / "model")]) == 1
    assert "line 1: the chat template does not render 'tools' of the row" in capsys.readouterr().out


def test_lone_surrogate_in_a_label_is_printed(tmp_path):
    command = [sys.executable, "-m", "roll_gspo.data", "check", write(tmp_path, {**GOOD, "domain": "\ud83d"})]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and r"domains  \ud83d 1" in result.stdout, result.stderr


def test_command_does_not_import_torch(tmp_path):
    path = write(tmp_path, GOOD)
    program = f"import sys; from roll_gspo.data.__main__ import main; main(['check', {path!r}]); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert not {"torch", "transformers", "numpy", "jinja2"} & set(out.split())


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files in ../shared/data")
def test_gsm8k_files_pass_and_share_no_prompt(capsys):
    assert main(["check", str(GSM8K / "train.jsonl"), "--against", str(GSM8K / "test.jsonl")]) == 0
    assert "7473 rows, 0 errors, 0 warnings" in capsys.readouterr().out
