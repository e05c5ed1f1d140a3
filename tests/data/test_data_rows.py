"""Reading data files: formats, line numbers, refusals."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from pathlib import Path

import pytest

from roll_gspo.data.rows import Columns, DataRow, Reading, read_rows
from roll_gspo.errors import DataError, MissingDependencyError

WHERE = "actor_train.data_args.file_name"
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
MATH = GSM8K.parent / "math_benchmarks" / "math_benchmarks.jsonl"


def write(folder: Path, *lines: str, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_rows_of_roll_and_plain_format_become_the_same(tmp_path):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    roll = {"id": "7", "messages": json.dumps(conversation), "ground_truth": "2", "tag": "sums", "domain": "math"}
    plain = {"question": "1+1?", "answer": "One and one.\n#### 1,002", "difficulty": 0.5}
    rows = read_rows([write(tmp_path, json.dumps(roll), "", json.dumps(plain))], WHERE)
    assert rows[0] == DataRow("7", tuple(conversation), "2", "math", "sums", {"source": "rows"})
    assert rows[1].messages == ({"role": "user", "content": "1+1?"},)
    assert rows[1].ground_truth == "1002"
    assert rows[1].id.endswith("rows.jsonl:3")
    assert rows[1].extra == {"difficulty": 0.5, "source": "rows"}


@pytest.mark.parametrize("column", [{"instruction_id_list": ["punctuation:no_comma"]}, {"test_cases": [{"x": 1}]}])
def test_rows_that_say_otherwise_what_is_right_need_no_answer(tmp_path, column):
    (row,) = read_rows([write(tmp_path, json.dumps({"key": 1, "prompt": "x", **column}))], WHERE)
    assert row.ground_truth == "" and column.items() <= row.extra.items()


def test_messages_may_be_a_list_and_ground_truth_a_number(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}], "ground_truth": 72}
    (read,) = read_rows([write(tmp_path, json.dumps([row]), name="rows.json")], WHERE)
    assert (read.ground_truth, read.messages[0]["content"]) == ("72", "x")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"prompt": "x"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"ground_truth": "1", "difficulty": 3}', "no prompt.*ground_truth, difficulty"),
        ('{"prompt": "x", "tag": "t"}', "no answer.*prompt, tag"),
        ('{"prompt": "", "ground_truth": "1"}', "no prompt"),
        ('{"messages": [{"role": "user"}], "ground_truth": "1"}', "role, content"),
        ('{"messages": "no list", "ground_truth": "1"}', "role, content"),
    ],
)
def test_malformed_row_is_named_by_file_and_line(tmp_path, bad, told):
    good = '{"prompt": "x", "ground_truth": "1"}'
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{told}"):
        read_rows([write(tmp_path, good, "", bad, good)], WHERE)


def test_skip_leaves_malformed_rows_out_and_counts_them_once(tmp_path, caplog):
    good = '{"prompt": "x", "ground_truth": "1"}'
    with caplog.at_level(logging.WARNING):
        rows = read_rows([write(tmp_path, good, "{", good, "[]")], WHERE, on_bad_row="skip")
    assert len(rows) == 2
    (record,) = caplog.records
    assert "2 malformed" in record.getMessage() and "rows.jsonl:2" in record.getMessage()


def test_unusual_line_separators_inside_a_string_do_not_end_the_row(tmp_path):
    text = "a\u2028b\x85c"
    row = json.dumps({"prompt": text, "ground_truth": "1"}, ensure_ascii=False)
    path = write(tmp_path, "\ufeff" + row, "{")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        read_rows([path], WHERE)
    assert read_rows([path], WHERE, on_bad_row="skip")[0].messages[0]["content"] == text


@pytest.mark.parametrize("content", ["", "\n\n", "{"])
def test_file_without_usable_row_is_an_error_that_names_the_key(tmp_path, content):
    with pytest.raises(DataError, match=f"{WHERE}: .*no usable row"):
        read_rows([write(tmp_path, content)], WHERE, on_bad_row="skip")


def test_missing_file_and_folder_are_errors_that_name_the_key(tmp_path):
    with pytest.raises(DataError, match=f"{WHERE}: .*absent.jsonl.*no such file"):
        read_rows([str(tmp_path / "absent.jsonl")], WHERE)
    with pytest.raises(DataError, match=f"{WHERE}: .*is a folder"):
        read_rows([str(tmp_path)], WHERE)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        read_rows([write(tmp_path, "PAR1", name="rows.parquet")], WHERE)


def test_parquet_rows_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"question": ["1+1?", None], "answer": ["#### 2", "#### 3"]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet\[1\]: no prompt"):
        read_rows([str(path)], WHERE)
    (row,) = read_rows([str(path)], WHERE, on_bad_row="skip")
    assert (row.id, row.ground_truth) == (f"{path}[0]", "2")
    with pytest.raises(DataError, match=f"{WHERE}: .*cannot be read as parquet"):
        read_rows([write(tmp_path, "no parquet", name="bad.parquet")], WHERE)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the checkout")
def test_gsm8k_answers_are_the_numbers_after_the_mark():
    rows = read_rows([str(GSM8K / "train.jsonl"), str(GSM8K / "test.jsonl")], WHERE)
    assert len(rows) == 7473 + 1319
    assert rows[0].ground_truth == "72"
    assert all(row.ground_truth.lstrip("-").replace(".", "", 1).isdigit() for row in rows)


@pytest.mark.skipif(not MATH.is_file(), reason="the MATH file is not beside the checkout")
def test_math_benchmark_rows_keep_their_system_message():
    rows = read_rows([str(MATH)], WHERE)
    assert len(rows) == 560
    assert {row.domain for row in rows} == {"math_rule"}
    assert {tuple(m["role"] for m in row.messages) for row in rows} == {("system", "user")}


GOOD = '{"prompt": "x", "ground_truth": "1"}'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            GOOD + "\n" + GOOD[:20],
            r"rows\.jsonl:2: not valid JSON .*the last line and has no end: was the file cut off",
        ),
        ('{"prompt": "x", "ground_truth": "1", "prompt": "y"}', r"rows\.jsonl:1: .*the key 'prompt' is there twice"),
        ('{"prompt": "x", "ground_truth": NaN}', r"rows\.jsonl:1: .*NaN is not a JSON value; write null"),
        (GOOD + "\n[" + GOOD + "]", r"rows\.jsonl:2: expected a JSON object"),
        ('{"messages": "[{", "ground_truth": "1"}', r"rows\.jsonl:1: .*got a text that is not JSON"),
        (
            '{"messages": [{"role": "human", "content": "x"}], "answer": "1"}',
            r"unknown role 'human' .*did you mean 'user'",
        ),
        ('{"messages": [{"from": "human", "value": "x"}], "answer": "1"}', "rename from to role and value to content"),
        ('{"messages": [{"role": "user", "content": ["x"]}], "answer": "1"}', r"content \['x'\], not a text"),
        ('{"prompt": "x", "ground_truth": ' + "[" * 100_000, r"rows\.jsonl:1: .*(nested too deeply|not valid JSON)"),
    ],
    ids=["cut", "twice", "nan", "list", "messages", "role", "sharegpt", "parts", "deep"],
)
def test_damaged_line_says_what_is_wrong_with_it(tmp_path, content, told):
    with pytest.raises(DataError, match=told):
        read_rows([write(tmp_path, content)], WHERE)


def test_bytes_that_are_no_text_are_named_with_line_and_position(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode().replace(b"x", b"\xff"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*not UTF-8: byte 0xff at position 13"):
        read_rows([str(path)], WHERE)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the file is UTF-16; save it as UTF-8"):
        read_rows([str(path)], WHERE)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    assert [row.id for row in read_rows([str(path)], WHERE)] == [f"{path}:1", f"{path}:3"]


def test_line_beyond_all_measure_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_gspo.data.files.MAX_LINE_BYTES", 100)
    path = write(tmp_path, GOOD, '{"prompt": "' + "x" * 350 + '"}', GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*longer than"):
        read_rows([path], WHERE)
    assert [row.id for row in read_rows([path], WHERE, "skip")] == [f"{path}:1", f"{path}:3"]


def test_zipped_files_are_read_and_torn_ones_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed := gzip.compress((GOOD + "\n").encode() * 50))
    assert len(read_rows([str(path)], WHERE)) == 50
    path.write_bytes(packed[:-12])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read .*ended"):
        read_rows([str(path)], WHERE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" + GOOD + ",\n" + GOOD[:22], r"rows\.json:2: not valid JSON .*was it cut off"),
        ("{\n" + GOOD[1:], r"rows\.json: expected a JSON list of rows"),
        ("", "rows.json has no usable row"),
        ("[]", "rows.json has no usable row"),
    ],
)
def test_json_file_that_is_no_list_of_rows(tmp_path, content, told):
    with pytest.raises(DataError, match=told):
        read_rows([write(tmp_path, content, name="rows.json")], WHERE)


def test_json_file_with_one_object_a_line_is_read_as_lines(tmp_path):
    path = write(tmp_path, GOOD, GOOD, name="rows.json")
    assert [row.id for row in read_rows([path], WHERE)] == [f"{path}:1", f"{path}:2"]


def test_file_of_another_format_names_those_that_are_read(tmp_path):
    with pytest.raises(
        DataError, match=r"rows\.csv: files that end in '\.csv' are not read; convert it to .*\.parquet"
    ):
        read_rows([write(tmp_path, "prompt,answer", name="rows.csv")], WHERE)


def test_parquet_file_with_a_header_alone_has_no_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"question": [], "answer": []}), path)
    with pytest.raises(DataError, match=r"rows\.parquet has no usable row"):
        read_rows([str(path)], WHERE)


def test_columns_of_other_names_are_read_when_named(tmp_path):
    row = {"problem": "1+1?", "solution": "2", "kind": "sums", "answer": "long", "prompt": "unused"}
    reading = Reading(Columns(prompt="problem", ground_truth="solution", tag="kind"))
    (read,) = read_rows([write(tmp_path, json.dumps(row))], WHERE, reading=reading)
    assert (read.messages[0]["content"], read.ground_truth, read.tag) == ("1+1?", "2", "sums")
    assert read.extra == {"answer": "long", "source": "rows"}, "a reward's own argument cannot be a column"
    conversation = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path, json.dumps({"chat": conversation, "answer": "2"}))
    assert read_rows([path], WHERE, reading=Reading(Columns(messages="chat")))[0].messages == tuple(conversation)
    with pytest.raises(DataError, match=r"no prompt: expected talk, found chat, answer"):
        read_rows([path], WHERE, reading=Reading(Columns(messages="talk")))


def test_rows_keep_the_name_of_their_file_unless_they_have_a_source(tmp_path):
    (tmp_path / "b").mkdir()
    with_source = json.dumps({**json.loads(GOOD), "source": "own"})
    paths = [write(tmp_path, GOOD, with_source, name=n) for n in ("aime.jsonl", "math.jsonl", "b/math.jsonl")]
    sources = [row.extra["source"] for row in read_rows(paths, WHERE)]
    assert sources == ["aime", "own", paths[1], "own", paths[2], "own"]


def test_file_gives_its_domain_to_rows_without_domain_and_tag(tmp_path):
    lines = [json.dumps({**json.loads(GOOD), **more}) for more in ({}, {"domain": "own"}, {"tag": "t"})]
    path = write(tmp_path, *lines)
    rows = read_rows([path], WHERE, reading=Reading(file_domains={path: "math"}))
    assert [row.domain for row in rows] == ["math", "own", ""]
