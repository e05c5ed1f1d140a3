from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.batch import Prompt
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.sft import SftConfig
from roll_gspo.data.sampler import Sampler
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import byte_tokenizer
from roll_gspo.pipelines.rlvr.datasets import chat_format, make_sampler, read_datasets, tokenize
from roll_gspo.pipelines.sft.build import read_data

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


def test_files_are_used_whole_without_num_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "y", "ground_truth": "1"}\n' * 5000)
    files = (f"{FILE}={tmp_path}/a.jsonl", f"validation.data_args.file_name={tmp_path}/a.jsonl")
    datasets = read_datasets(load_config("example_gspo", *files).config)
    assert (len(datasets.train), len(datasets.validation)) == (5000, 5000)
    config = load_config("example_sft", *files).config
    assert isinstance(config, SftConfig)
    assert len(read_data(config.actor_train.data_args, FILE, "train")) == 5000


def test_generated_task_stands_alone() -> None:
    for names in ("[builtin:column_addition,x.jsonl]", "builtin:multiplication"):
        with pytest.raises(DataError, match=f"{FILE}: .*builtin:column_addition"):
            read_datasets(load_config("example_gspo", f"{FILE}={names}").config)


def test_prompts_have_the_chat_template_and_the_row() -> None:
    config = load_config("example_gspo", "actor_train.data_args.num_rows=3").config
    rows = read_datasets(config).train
    prompts = tokenize(config, config.actor_train.data_args, rows, byte_tokenizer(), config.prompt_length)
    assert [p.text for p in prompts] == [f"<|user|>{row.id}=<|assistant|>" for row in rows]
    assert [p.row["ground_truth"] for p in prompts] == [row.ground_truth for row in rows]


SHARES = "actor_train.data_args.domain_interleave_probs"
BLOCKS = ("+rewards.code.worker_cls=exact_match", "+rewards.math={worker_cls: math_rule, tag_included: [sums]}")


def _config(folder: Path, shares: str | None, *overrides: str) -> ExperimentConfig:
    """Ten rows of `code` by domain and five of `math` by tag."""
    code = [{"prompt": f"c{i}", "ground_truth": "1", "domain": "code"} for i in range(10)]
    sums = [{"prompt": f"m{i}", "ground_truth": "1", "tag": "sums"} for i in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, code + sums)))
    given = [] if shares is None else [f"+{SHARES}={shares}"]
    arguments = (f"{FILE}={folder}/rows.jsonl", "validation=null", *BLOCKS, *given, *overrides)
    return load_config("example_gspo", *arguments).config


def _sampler(config: ExperimentConfig) -> Sampler[Prompt]:
    args = config.actor_train.data_args
    train = read_datasets(config).train
    return make_sampler(config, tokenize(config, args, train, byte_tokenizer(), config.prompt_length))


def test_batches_have_the_shares_of_the_reward_blocks(tmp_path: Path) -> None:
    sampler = _sampler(_config(tmp_path, "{code: 0.25, math: 0.75}"))
    for _ in range(5):
        batch = sampler.next_batch(8)
        assert sum(prompt.row["tag"] == "sums" for prompt in batch) == 6
    assert sampler.epochs() == {"": 0.0, "code": 0.0, "math": 5.0}


def test_without_shares_all_rows_are_one_list(tmp_path: Path) -> None:
    sampler = _sampler(_config(tmp_path, None))
    assert len({prompt.token_ids for prompt in sampler.next_batch(15)}) == 15 and sampler.epochs() == {"": 0.0}


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ("{code: 1}", "it does not name math .rows of the data: code 10, math 5; shares: code."),
        ("{column_addition: 0.5, code: 0.5}", "it does not name math, and the data has no row of column_addition"),
        ("{math: 0.5, code: 0.5, column_addition: 0}", "the data has no row of column_addition"),
    ],
)
def test_shares_and_data_name_the_same_domains(tmp_path: Path, shares: str, told: str) -> None:
    with pytest.raises(DataError, match=f"{SHARES}: {told}"):
        read_datasets(_config(tmp_path, shares))


def test_domain_that_the_length_filter_empties_is_named(tmp_path: Path) -> None:
    config = _config(tmp_path, "{code: 0.5, math: 0.5}", "prompt_length=4")
    rows = read_datasets(config).train
    long = [replace(row, messages=({"role": "user", "content": "m" * 9},)) if row.tag else row for row in rows]
    prompts = tokenize(config, config.actor_train.data_args, long, byte_tokenizer(), config.prompt_length)
    with pytest.raises(DataError, match=r"the data within prompt_length 4 has no row of math"):
        make_sampler(config, prompts)


def test_resume_with_other_prompts_of_the_same_number_is_refused(tmp_path: Path) -> None:
    state = _sampler(_config(tmp_path, "{code: 0.5, math: 0.5}")).state_dict()
    _sampler(_config(tmp_path, "{code: 0.5, math: 0.5}")).load_state_dict(state)
    changed = _config(tmp_path, "{code: 0.5, math: 0.5}", "actor_train.data_args.system_prompt=brief")
    with pytest.raises(ValueError, match="prompts differ"):
        _sampler(changed).load_state_dict(state)


def test_chat_format_of_validation_follows_training_unless_it_names_its_own(tmp_path: Path) -> None:
    template = "actor_train.data_args.template"
    for overrides, expected in (
        ((), "native"),
        ((f"+{template}=plain",), "plain"),
        ((f"+{template}=plain", "+validation.data_args.template=native"), "native"),
        ((f"+{template}=plain", "global_template=chatml"), "chatml"),
    ):
        config = load_config("example_gspo", *overrides).config
        assert config.validation is not None
        assert chat_format(config, config.validation.data_args).template == expected


def test_tag_with_a_template_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tag_to_template: no row has the tag sum \(tags of the data: sums\)"):
        read_datasets(_config(tmp_path, None, "tag_to_template={sum: plain}"))


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        (f"+{SHARES}={{column_addition: 0.9}}", SHARES, ("0.9",)),
        (f"+{SHARES}={{column_addition: .nan}}", f"{SHARES}.column_addition", ()),
        (f"+{SHARES}={{poetry: 1}}", SHARES, ("poetry", "column_addition")),
        (
            "+validation.data_args.domain_interleave_probs={column_addition: 1}",
            "validation.data_args.domain_interleave_probs",
            ("training",),
        ),
        (
            "actor_train.data_args={file_name: y, file_domains: {x: column_addition}}",
            "actor_train.data_args.file_domains",
            ("x", "file_name"),
        ),
        ("actor_train.data_args={file_name: x, prompt: a, messages: b}", "actor_train.data_args.messages", ("a", "b")),
        ("+validation.data_args.split=test", "validation.data_args.split", ("test", "builtin:column_addition")),
        ("actor_train.data_args.domain=sums", "actor_train.data_args.domain", ("sums", "builtin:column_addition")),
        ("actor_train.data_args.on_bad_row=skip", "actor_train.data_args.on_bad_row", ("builtin:column_addition",)),
        ("actor_train.data_args.tag=kind", "actor_train.data_args.tag", ("kind", "builtin:column_addition")),
        ("+actor_train.data_args.ground_truth=sum", "actor_train.data_args.ground_truth", ("sum",)),
        ("+actor_train.data_args.template=chatlm", "actor_train.data_args.template", ("chatlm", "chatml")),
    ],
)
def test_contradicting_data_keys_are_refused(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(override)
    assert problem.key == key and problem.names(*values)
