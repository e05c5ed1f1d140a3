"""Reading data files: formats, line numbers, refusals."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from roll_gspo.data.rows import DataRow, read_rows
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
    assert rows[0] == DataRow("7", tuple(conversation), "2", "math", "sums", {})
    assert rows[1].messages == ({"role": "user", "content": "1+1?"},)
    assert rows[1].ground_truth == "1002"
    assert rows[1].id.endswith("rows.jsonl:3")
    assert rows[1].extra == {"difficulty": 0.5}


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
