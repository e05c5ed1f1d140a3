"""Reading data files: formats, line numbers in errors, and malformed rows."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from pathlib import Path

import pytest

from roll_gspo.data.messages import Columns
from roll_gspo.data.rows import DataRow, ReadOptions, read_rows
from roll_gspo.errors import DataError, MissingDependencyError

KEY = "actor_train.data_args.file_name"
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
MATH = GSM8K.parent / "math_benchmarks" / "math_benchmarks.jsonl"


def write(folder: Path, *lines: str, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_roll_format_and_plain_format_are_read(tmp_path):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    roll = {"id": "7", "messages": json.dumps(conversation), "ground_truth": "2", "tag": "sums", "domain": "math"}
    plain = {"question": "1+1?", "answer": "One and one.\n#### 1,002", "difficulty": 0.5}
    rows = read_rows([write(tmp_path, json.dumps(roll), "", json.dumps(plain))], KEY)
    assert rows[0] == DataRow("7", tuple(conversation), "2", "math", "sums", {"source": "rows"})
    assert rows[1].messages == ({"role": "user", "content": "1+1?"},)
    assert rows[1].ground_truth == "1002"
    assert rows[1].id.endswith("rows.jsonl:3")
    assert rows[1].extra == {"difficulty": 0.5, "source": "rows"}


@pytest.mark.parametrize("column", [{"instruction_id_list": ["punctuation:no_comma"]}, {"test_cases": [{"x": 1}]}])
def test_rows_with_instructions_or_test_cases_need_no_answer(tmp_path, column):
    (row,) = read_rows([write(tmp_path, json.dumps({"key": 1, "prompt": "x", **column}))], KEY)
    assert row.ground_truth == "" and column.items() <= row.extra.items()


def test_messages_may_be_a_list_and_ground_truth_a_number(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}], "ground_truth": 72}
    (read,) = read_rows([write(tmp_path, json.dumps([row]), name="rows.json")], KEY)
    assert (read.ground_truth, read.messages[0]["content"]) == ("72", "x")


@pytest.mark.parametrize(
    ("final", "ground_truth"),
    [
        *(("1,234", "1234"), ("$1,234.50 in all", "$1234.50 in all"), ("0,1", "0,1"), ("(3, 4)", "(3, 4)")),
        *(("[1, 5)", "[1, 5)"), ("2, 3, 5", "2, 3, 5"), ("(1,234)", "(1,234)"), ("1,234, 5,678", "1,234, 5,678")),
    ],
)
def test_only_commas_in_one_grouped_number_are_removed(tmp_path, final, ground_truth):
    row = {"question": "x", "answer": f"So.\n#### {final}"}
    (read,) = read_rows([write(tmp_path, json.dumps(row))], KEY)
    assert read.ground_truth == ground_truth


@pytest.mark.parametrize(("number", "text"), [(1e-05, "0.00001"), (1e16, "10000000000000000"), (2.5, "2.5"), (3, "3")])
def test_numbers_have_no_exponent(tmp_path, number, text):
    (read,) = read_rows([write(tmp_path, json.dumps({"prompt": "x", "ground_truth": number}))], KEY)
    assert read.ground_truth == text


@pytest.mark.parametrize(
    ("bad", "match"),
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
def test_malformed_row_raises_with_file_and_line(tmp_path, bad, match):
    good = '{"prompt": "x", "ground_truth": "1"}'
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{match}"):
        read_rows([write(tmp_path, good, "", bad, good)], KEY)


def test_skip_drops_malformed_rows_with_one_warning(tmp_path, caplog):
    good = '{"prompt": "x", "ground_truth": "1"}'
    with caplog.at_level(logging.WARNING):
        rows = read_rows([write(tmp_path, good, "{", good, "[]")], KEY, on_bad_row="skip")
    assert len(rows) == 2
    (record,) = caplog.records
    assert "2 malformed" in record.getMessage() and "rows.jsonl:2" in record.getMessage()


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    text = "a\u2028b\x85c"
    row = json.dumps({"prompt": text, "ground_truth": "1"}, ensure_ascii=False)
    path = write(tmp_path, "\ufeff" + row, "{")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        read_rows([path], KEY)
    assert read_rows([path], KEY, on_bad_row="skip")[0].messages[0]["content"] == text


@pytest.mark.parametrize("content", ["", "\n\n", "{"])
def test_file_without_usable_rows_raises_with_key(tmp_path, content):
    with pytest.raises(DataError, match=f"{KEY}: .*no usable row"):
        read_rows([write(tmp_path, content)], KEY, on_bad_row="skip")


def test_missing_file_and_empty_folder_raise_with_key(tmp_path):
    with pytest.raises(DataError, match=f"{KEY}: .*absent.jsonl.*no such file"):
        read_rows([str(tmp_path / "absent.jsonl")], KEY)
    with pytest.raises(DataError, match=f"{KEY}: the folder {tmp_path}"):
        read_rows([str(tmp_path)], KEY)


def test_parquet_without_pyarrow_raises_with_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        read_rows([write(tmp_path, "PAR1", name="rows.parquet")], KEY)


def test_parquet_rows_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"question": ["1+1?", None], "answer": ["#### 2", "#### 3"]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet\[1\]: no prompt"):
        read_rows([str(path)], KEY)
    (row,) = read_rows([str(path)], KEY, on_bad_row="skip")
    assert (row.id, row.ground_truth) == (f"{path}[0]", "2")
    with pytest.raises(DataError, match=rf"{KEY}: .*bad\.parquet"):
        read_rows([write(tmp_path, "no parquet", name="bad.parquet")], KEY)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files in ../shared/data")
def test_gsm8k_answers_are_the_numbers_after_the_separator():
    rows = read_rows([str(GSM8K / "train.jsonl"), str(GSM8K / "test.jsonl")], KEY)
    assert len(rows) == 7473 + 1319
    assert rows[0].ground_truth == "72"
    assert all(row.ground_truth.lstrip("-").replace(".", "", 1).isdigit() for row in rows)


@pytest.mark.skipif(not MATH.is_file(), reason="needs the MATH file in ../shared/data")
def test_math_benchmark_rows_keep_their_system_message():
    rows = read_rows([str(MATH)], KEY)
    assert len(rows) == 560
    assert {row.domain for row in rows} == {"math_rule"}
    assert {tuple(m["role"] for m in row.messages) for row in rows} == {("system", "user")}


GOOD = '{"prompt": "x", "ground_truth": "1"}'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (GOOD + "\n" + GOOD[:20], r"rows\.jsonl:2: not valid JSON .*truncated"),
        ('{"prompt": "x", "ground_truth": "1", "prompt": "y"}', r"rows\.jsonl:1: .*the key 'prompt'"),
        ('{"prompt": "x", "ground_truth": NaN}', r"rows\.jsonl:1: .*NaN"),
        (GOOD + "\n[" + GOOD + "]", r"rows\.jsonl:2: expected a JSON object"),
        ('{"messages": "[{", "ground_truth": "1"}', r"rows\.jsonl:1: messages .*JSON"),
        ('{"messages": [{"role": "human", "content": "x"}], "answer": "1"}', r"role 'human' .*'user'"),
        ('{"messages": [{"from": "human", "value": "x"}], "answer": "1"}', "rename from to role and value to content"),
        ('{"messages": [{"role": "user", "content": ["x"]}], "answer": "1"}', r"message 1 .*content \['x'\]"),
        ('{"prompt": "x", "ground_truth": ' + "[" * 100_000, r"rows\.jsonl:1: not valid JSON"),
    ],
    ids=["truncated", "duplicate", "nan", "list", "messages", "role", "sharegpt", "parts", "deep"],
)
def test_malformed_line_raises_with_the_reason(tmp_path, content, match):
    with pytest.raises(DataError, match=match):
        read_rows([write(tmp_path, content)], KEY)


def test_wrong_encoding_raises_with_line_and_position(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode().replace(b"x", b"\xff"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*byte 0xff at position 13"):
        read_rows([str(path)], KEY)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*UTF-16"):
        read_rows([str(path)], KEY)


def test_byte_order_mark_and_windows_newlines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    assert [row.id for row in read_rows([str(path)], KEY)] == [f"{path}:1", f"{path}:3"]


def test_line_above_the_size_limit_is_one_malformed_row(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_gspo.data.files.MAX_LINE_BYTES", 100)
    path = write(tmp_path, GOOD, '{"prompt": "' + "x" * 350 + '"}', GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*MiB"):
        read_rows([path], KEY)
    assert [row.id for row in read_rows([path], KEY, "skip")] == [f"{path}:1", f"{path}:3"]


def test_gzip_files_are_read_and_truncated_ones_raise(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed := gzip.compress((GOOD + "\n").encode() * 50))
    assert len(read_rows([str(path)], KEY)) == 50
    path.write_bytes(packed[:-12])
    with pytest.raises(DataError, match=rf"{KEY}: .*rows\.jsonl\.gz "):
        read_rows([str(path)], KEY)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[" + GOOD + ",\n" + GOOD[:22], r"rows\.json:2: not valid JSON .*truncated"),
        ("{\n" + GOOD[1:], r"rows\.json: expected a JSON list of rows"),
        ("", "rows.json has no usable row"),
        ("[]", "rows.json has no usable row"),
    ],
)
def test_invalid_json_file_raises(tmp_path, content, match):
    with pytest.raises(DataError, match=match):
        read_rows([write(tmp_path, content, name="rows.json")], KEY)


def test_json_file_with_one_object_per_line_is_read_as_jsonl(tmp_path):
    path = write(tmp_path, GOOD, GOOD, name="rows.json")
    assert [row.id for row in read_rows([path], KEY)] == [f"{path}:1", f"{path}:2"]


def test_unknown_extension_raises_with_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv .*'\.csv'.*\.jsonl.*\.parquet"):
        read_rows([write(tmp_path, "prompt,answer", name="rows.csv")], KEY)


def test_parquet_file_without_rows_raises(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"question": [], "answer": []}), path)
    with pytest.raises(DataError, match=r"rows\.parquet has no usable row"):
        read_rows([str(path)], KEY)


def test_column_names_are_configurable(tmp_path):
    row = {"problem": "1+1?", "solution": "2", "kind": "sums", "answer": "long", "prompt": "unused"}
    options = ReadOptions(Columns(prompt="problem", ground_truth="solution", tag="kind"))
    (read,) = read_rows([write(tmp_path, json.dumps(row))], KEY, options=options)
    assert (read.messages[0]["content"], read.ground_truth, read.tag) == ("1+1?", "2", "sums")
    assert read.extra == {"answer": "long", "source": "rows"}, "reserved columns are dropped"
    conversation = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path, json.dumps({"chat": conversation, "answer": "2"}))
    assert read_rows([path], KEY, options=ReadOptions(Columns(messages="chat")))[0].messages == tuple(conversation)
    with pytest.raises(DataError, match=r"no prompt: .*talk.*chat, answer"):
        read_rows([path], KEY, options=ReadOptions(Columns(messages="talk")))


def test_source_defaults_to_the_name_of_the_file(tmp_path):
    (tmp_path / "b").mkdir()
    with_source = json.dumps({**json.loads(GOOD), "source": "own"})
    paths = [write(tmp_path, GOOD, with_source, name=n) for n in ("aime.jsonl", "math.jsonl", "b/math.jsonl")]
    sources = [row.extra["source"] for row in read_rows(paths, KEY)]
    assert sources == ["aime", "own", paths[1], "own", paths[2], "own"]


def test_file_domain_applies_to_rows_without_domain_and_tag(tmp_path):
    lines = [json.dumps({**json.loads(GOOD), **more}) for more in ({}, {"domain": "own"}, {"tag": "t"})]
    path = write(tmp_path, *lines)
    rows = read_rows([path], KEY, options=ReadOptions(file_domains={path: "math"}))
    assert [row.domain for row in rows] == ["math", "own", ""]


VERL = {
    "prompt": [{"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "data_source": "openai/gsm8k",
    "extra_info": {"index": 3, "level": "easy"},
}


def test_rows_of_verl_are_read(tmp_path):
    (row,) = read_rows([write(tmp_path, json.dumps(VERL))], KEY)
    assert (row.messages, row.ground_truth) == (tuple(VERL["prompt"]), "2")
    assert row.extra == {**{k: v for k, v in VERL.items() if k != "prompt"}, "source": "openai/gsm8k"}
    (row,) = read_rows(
        [write(tmp_path, json.dumps(VERL))], KEY, options=ReadOptions(Columns(ground_truth="reward_model"))
    )
    assert row.ground_truth == "2", "not the JSON text of the object"


def test_dotted_names_are_paths_into_objects(tmp_path):
    nested = {"chat": {"turns": VERL["prompt"]}, "extra_info": VERL["extra_info"], "a.b": "2"}
    path = write(tmp_path, json.dumps(nested))
    (row,) = read_rows([path], KEY, options=ReadOptions(Columns("chat.turns", None, "a.b", "extra_info.level")))
    assert (row.messages, row.ground_truth, row.tag) == (tuple(VERL["prompt"]), "2", "easy")
    assert row.extra["extra_info"] == VERL["extra_info"]
    with pytest.raises(DataError, match=r"no answer: expected column extra_info\.answer"):
        read_rows([path], KEY, options=ReadOptions(Columns("chat.turns", None, "extra_info.answer")))


def test_conversations_that_end_with_the_answer_are_refused_or_cut(tmp_path):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path, json.dumps({"messages": turns, "ground_truth": "2"}))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*roles user, assistant.*drop_last_answer: true"):
        read_rows([path], KEY)
    (row,) = read_rows([path], KEY, options=ReadOptions(drop_last_answer=True))
    assert row.messages == (turns[0],)
    path = write(tmp_path, json.dumps({"messages": turns[1:], "ground_truth": "2"}))
    with pytest.raises(DataError, match="all messages are from the assistant"):
        read_rows([path], KEY, options=ReadOptions(drop_last_answer=True))


def test_lone_surrogate_in_a_prompt_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: message 1 has \\udc00"):
        read_rows([write(tmp_path, '{"prompt": "\\udc00x", "answer": "1"}')], KEY)
