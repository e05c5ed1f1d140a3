from __future__ import annotations

import json
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.errors import DataError
from roll_gspo.models.tiny import byte_tokenizer
from roll_gspo.pipelines.datasets import read_datasets, tokenize

FILE = "actor_train.data_args.file_name"


def test_generated_rows_are_the_same_for_every_seed_and_held_out_ones_are_apart() -> None:
    first, second = (read_datasets(load_config("example_gspo", f"seed={seed}").config) for seed in (1, 2))
    assert first == second
    assert (len(first.train), len(first.validation)) == (4096, 256)
    assert {row.id for row in first.train}.isdisjoint(row.id for row in first.validation)


def test_files_are_read_in_order_up_to_num_rows(tmp_path: Path) -> None:
    for name in "ab":
        rows = [{"prompt": f"{name}{i}", "ground_truth": str(i)} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = f"{FILE}=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]"
    config = load_config("example_gspo", files, "actor_train.data_args.num_rows=4", "validation=null").config
    datasets = read_datasets(config)
    assert [row.messages[0]["content"] for row in datasets.train] == ["a0", "a1", "a2", "b0"]
    assert datasets.validation == []


def test_generated_task_stands_alone() -> None:
    for names in ("[builtin:column_addition,x.jsonl]", "builtin:multiplication"):
        with pytest.raises(DataError, match=f"{FILE}: .*the generated task is 'builtin:column_addition'"):
            read_datasets(load_config("example_gspo", f"{FILE}={names}").config)


def test_prompts_have_the_chat_template_and_the_row() -> None:
    config = load_config("example_gspo", "actor_train.data_args.num_rows=3").config
    rows = read_datasets(config).train
    prompts = tokenize(rows, byte_tokenizer(), config.actor_train.data_args, config.prompt_length)
    assert [p.text for p in prompts] == [f"<|user|>{row.id}=<|assistant|>" for row in rows]
    assert [p.row["ground_truth"] for p in prompts] == [row.ground_truth for row in rows]
