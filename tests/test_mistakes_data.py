"""Mistakes in model folders, tokenizers, chat templates and rows: one line that names file or key, exit status 2."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed import load_config

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.load import Loaded
from roll_gspo.models import tiny
from roll_gspo.pipelines.rlvr.datasets import read_datasets, tokenize
from roll_gspo.run import exit_status, run

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
CONSTANT = "{{ bos_token }}Hello{% if add_generation_prompt %}<|assistant|>{% endif %}"
ONLY_ROLES = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{{ raise_exception('no system') if m['role'] == 'system' }}{{ m['content'] }}{% endfor %}"
)
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("mistakes") / "model"
    tiny.save(tiny.build_model(tiny.TINY_MODELS["tiny_qwen3"], 0), tiny.byte_tokenizer(), folder)
    return folder


@functools.cache
def loaded(*overrides: str) -> Loaded:
    common = (
        "warm_start=null",
        "max_steps=1",
        "validation=null",
        "kl=none",
        "track_with=none",
    )
    return load_config("example_gspo", *common, *overrides)


def outcome_of(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a job in this process; return exit status and the text after the heading."""
    code = exit_status(lambda: run(loaded), "")
    heading, _, text = capsys.readouterr().err.partition("\n")
    assert re.fullmatch(r"roll_gspo: 1 problem in the (configuration|data)", heading), heading
    return code, text


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str, num_bytes: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def change(name: str, **keys: Any) -> Damage:
    """Change keys of a JSON file; None removes a key."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        kept = {key: value for key, value in (values | keys).items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def index(weight_map: dict[str, str]) -> Damage:
    return both(
        lambda folder: (folder / SAFETENSORS).rename(folder / "model-00001-of-00002.safetensors"),
        write(INDEX, json.dumps({"weight_map": weight_map})),
    )


def rename_tokens(folder: Path) -> None:
    """Shift the ids of the vocabulary, as in the tokenizer of a larger model."""
    content = json.loads((folder / TOKENIZER).read_text())
    content["model"]["vocab"] = {token: number + 1000 for token, number in content["model"]["vocab"].items()}
    (folder / TOKENIZER).write_text(json.dumps(content))


def named_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / TEMPLATE).rename(folder / "additional_chat_templates/tool_use.jinja")


WITHOUT_END = both(change(CONFIG, eos_token_id=None), change(GENERATION, eos_token_id=None))
HF, MEGATRON = ("strategy=hf",), ("strategy=megatron",)

FOLDERS: dict[str, tuple[tuple[str, ...], Damage, tuple[str, ...]]] = {
    "no config": (HF, remove(CONFIG), ("pretrain: ", "has no config.json")),
    "config cut": (HF, cut(CONFIG, 200), (f"{CONFIG}:", "is not valid JSON")),
    "config is a list": (HF, write(CONFIG, "[1]"), (f"{CONFIG}: is no JSON object, but list",)),
    "config not UTF-8": (HF, lambda f: (f / CONFIG).write_bytes(b'{"a": "\xff"}'), (f"{CONFIG}: is not valid JSON",)),
    "no model type": (HF, change(CONFIG, model_type=None), (f"{CONFIG}: model_type is missing",)),
    "unknown family": (HF, change(CONFIG, model_type="zebra7"), (f"{CONFIG}: model_type 'zebra7' is not known",)),
    "family of vllm only": (HF, change(CONFIG, model_type="zebra7"), ("engines that know it: vllm",)),
    "family of no engine": (
        HF,
        change(CONFIG, model_type="zebra7", architectures=["ZebraForCausalLM"]),
        ("no engine knows it",),
    ),
    "family without megatron": (
        MEGATRON,
        change(CONFIG, model_type="gpt2"),
        ("'gpt2' is not supported", "which know llama", "strategy=fsdp2", "strategy=hf"),
    ),
    "missing size": (MEGATRON, change(CONFIG, hidden_size=None), ("hidden_size is missing",)),
    "size is text": (MEGATRON, change(CONFIG, hidden_size="128"), ("hidden_size: '128' is no positive integer",)),
    "no heads": (MEGATRON, change(CONFIG, num_attention_heads=0), ("num_attention_heads: 0 is no positive",)),
    "other depth": (HF, change(CONFIG, num_hidden_layers=6), ("num_hidden_layers is 6, but the weights have 4",)),
    "other vocabulary": (HF, change(CONFIG, vocab_size=300), ("are 300 and 128, but", "[264, 128]")),
    "no weights": (HF, remove(SAFETENSORS), (f"neither {SAFETENSORS} nor {INDEX}",)),
    "other weights": (
        MEGATRON,
        lambda folder: (folder / SAFETENSORS).rename(folder / "pytorch_model.bin"),
        (f"neither {SAFETENSORS} nor {INDEX}; convert pytorch_model.bin",),
    ),
    "weights cut": (HF, cut(SAFETENSORS, 100_000), (f"{SAFETENSORS}: ", "it has 100000 bytes, and its header")),
    "weights cut, megatron": (MEGATRON, cut(SAFETENSORS, 100_000), (f"{SAFETENSORS}: ", "it has 100000 bytes")),
    "weights empty": (HF, cut(SAFETENSORS, 0), (f"{SAFETENSORS}: ", "0 bytes are too few for its header")),
    "weights are a pointer": (
        HF,
        write(SAFETENSORS, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3087467144\n"),
        (f"{SAFETENSORS}: cannot be read as safetensors",),
    ),
    "missing shard": (
        HF,
        index({"a": "model-00002-of-00002.safetensors"}),
        (f"{INDEX}: names the file model-00002-of-00002.safetensors, which does not exist",),
    ),
    "empty index": (HF, index({}), (f"{INDEX}: weight_map is missing or empty",)),
    "index of other tensors": (
        HF,
        index({"score.weight": "model-00001-of-00002.safetensors"}),
        (f"{INDEX}: names 1 tensors that no file holds, e.g. 'score.weight'",),
    ),
    "stale index": (
        HF,
        write(INDEX, json.dumps({"weight_map": {"a": "model-00001-of-00009.safetensors"}})),
        (f"{INDEX}: names the file model-00001-of-00009", "remove the index"),
    ),
    "no tokenizer": (HF, remove(TOKENIZER), ("has no tokenizer (tokenizer.json or one of",)),
    "tokenizer cut": (HF, cut(TOKENIZER, 300), (f"{TOKENIZER}:", "is not valid JSON")),
    "no vocabulary": (HF, write(TOKENIZER, "{}"), (f"{TOKENIZER}: has no vocabulary",)),
    "other tokenizer": (HF, rename_tokens, (f"{TOKENIZER}: has the token id 1263, but vocab_size in {CONFIG} is 264",)),
    "tokenizer settings cut": (HF, cut(TOKENIZER_CONFIG, 20), (f"{TOKENIZER_CONFIG}:", "is not valid JSON")),
    "no end": (HF, both(WITHOUT_END, change(TOKENIZER_CONFIG, eos_token=None)), ("no end-of-sequence token",)),
    "end is text": (HF, change(GENERATION, eos_token_id="</s>"), (f"{GENERATION}: eos_token_id is '</s>'",)),
    "generation settings cut": (HF, cut(GENERATION, 9), (f"{GENERATION}:", "is not valid JSON")),
    "no template": (HF, remove(TEMPLATE), ("data_args.file_name: the tokenizer has no chat template",)),
    "constant template": (HF, write(TEMPLATE, CONSTANT), ("does not render the content of a user message", "'Hello")),
    "template of roles": (HF, write(TEMPLATE, ONLY_ROLES), ("does not render the content of a user message",)),
    "broken template": (
        HF,
        write(TEMPLATE, "{% for m in messages %}"),
        ("the chat template of the tokenizer: line 1",),
    ),
    "no default template": (HF, named_templates, ("the chat templates tool_use, but none called default",)),
    "template of another family": ((*HF, "global_template=chatml"), lambda _: None, ("chatml needs the tokens <|im_",)),
    "constant template file": (
        (*HF, "global_template=mine.jinja"),
        lambda folder: Path("mine.jinja").write_text(CONSTANT),
        ("the chat template mine.jinja does not render",),
    ),
    "broken template file": (
        (*HF, "global_template=mine.jinja"),
        lambda folder: Path("mine.jinja").write_text("a\n{{"),
        ("template: mine.jinja:2: invalid Jinja",),
    ),
    "head size": (MEGATRON, change(CONFIG, head_dim=48), ("attention heads of size 48 are not among those",)),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_mistake_in_a_model_folder_is_one_line(
    mistake: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, damage, texts = FOLDERS[mistake]
    shutil.copytree(model, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    damage(tmp_path / "m")
    base = loaded(*overrides)
    config = base.config.model_copy(update={"pretrain": str(tmp_path / "m")})
    code, text = outcome_of(dataclasses.replace(base, config=config), capsys)
    assert code == 2 and text.count("\n") == 1, text
    assert all(part in text for part in texts), text


USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
GOOD = {"messages": [USER], "ground_truth": "2", "domain": "column_addition"}
TOOL_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ROWS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "empty file": ((), None, "rows.jsonl has no usable row"),
    "cut line": ((), '{"prompt": "1', "rows.jsonl:1: not valid JSON"),
    "no prompt": ((), {"ground_truth": "2"}, "rows.jsonl:1: no prompt"),
    "no answer": ((), {"prompt": "1+1?"}, "rows.jsonl:1: no answer"),
    "no such column": (("ground_truth=solution",), GOOD, "rows.jsonl:1: no answer: expected column solution"),
    "no such nested column": (("prompt=extra_info.q",), GOOD, "rows.jsonl:1: no prompt: expected column extra_info.q"),
    "share GPT": ((), {**GOOD, "messages": [{"from": "human", "value": "x"}]}, "rename from to role"),
    "image": ((), {**GOOD, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not a string"),
    "ends with the answer": ((), {**GOOD, "messages": [USER, ANSWER]}, "roles user, assistant"),
    "nothing but answers": (("drop_last_answer=true",), {**GOOD, "messages": [ANSWER]}, "all messages are from"),
    "half a character": ((), {**GOOD, "messages": [{**USER, "content": "\ud83d"}]}, r"message 1 has \ud83d"),
    "dropped tool call": ((), {**GOOD, "messages": [TOOL_CALL, USER]}, "does not render 'tool_calls' of message 1"),
    "dropped tools": (
        (),
        {**GOOD, "tools": [{"name": "f"}]},
        "rows.jsonl:1: the chat template does not render 'tools'",
    ),
    "tools are names": ((), {**GOOD, "tools": ["f"]}, "tools must be a list of function schemas"),
    "call without a name": ((), {**GOOD, "messages": [{**USER, "tool_calls": [{}]}]}, "message 1 has the tool_calls"),
    "long prompts": ((), {**GOOD, "messages": [{**USER, "content": "1" * 999}]}, "prompt_length 32 (shortest 1001"),
    "unknown domain": ((), {**GOOD, "domain": "poetry"}, "domain 'poetry'"),
    "rejected role": (("template=mine.jinja", "system_prompt=s"), GOOD, "rejects the roles system, user (no system)"),
}


@pytest.mark.parametrize("mistake", ROWS)
def test_mistake_in_a_row_names_file_and_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, row, text = ROWS[mistake]
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text(NO_SYSTEM)
    Path("rows.jsonl").write_text("" if row is None else f"{row if isinstance(row, str) else json.dumps(row)}\n")
    keys = ("file_name=rows.jsonl", *keys)
    config = loaded(*HF, "prompt_length=32", *(f"actor_train.data_args.{key}" for key in keys)).config
    assert isinstance(config, ExperimentConfig)

    def read() -> int:
        rows = read_datasets(config).train
        tokenize(config, config.actor_train.data_args, rows, tiny.byte_tokenizer(), config.prompt_length)
        return 0

    assert exit_status(read, "") == 2
    err = capsys.readouterr().err
    assert err.startswith("roll_gspo: 1 problem in the data\n") and err.count("\n") == 2 and text in err, err
