"""Facts of a model folder that every engine reads in the same way: ends of sequences, padding, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import EOS, write_model
from transformers import AutoTokenizer

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import end_of_sequence_ids
from roll_gspo.models.folder_check import chat_templates, has_end_of_sequence
from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.pipelines.components import load_tokenizer
from roll_gspo.strategies.base import ModelSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import HfWeights, load_model


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "ids"),
    [
        ({"eos_token_id": 3}, None, None, (3,)),
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 5}, 2, (2, 3, 5, 7)),
        ({}, {"eos_token_id": [5, 5]}, 5, (5,)),
        ({"eos_token_id": None}, {}, 0, (0,)),
        ({"text_config": {"eos_token_id": 9}}, None, None, (9,)),
        ({}, None, None, ()),
    ],
)
def test_ids_of_all_files_and_the_tokenizer_end_a_response(
    tmp_path: Path, config: Any, generation: Any, tokenizer: int | None, ids: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_of_sequence_ids(tmp_path, SimpleNamespace(eos_token_id=tokenizer)) == ids
    if tokenizer is not None:
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert has_end_of_sequence(tmp_path) == bool(ids)


@pytest.mark.parametrize("declared", ["</s>", [1, "2"], True, -1, 1.5])
def test_ids_that_are_no_token_ids_are_refused(tmp_path: Path, declared: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is "):
        end_of_sequence_ids(tmp_path, SimpleNamespace(eos_token_id=None))


def test_hf_ends_responses_at_the_ids_of_the_request_only(tmp_path: Path) -> None:
    setup = ModelSetup(write_model(tmp_path, "llama"), torch.float32, 8, 1.0, 0)
    sampling = Sampling(num_samples=16, max_new_tokens=24)
    (completions,) = HfInfer(setup, HfConfig()).generate([[5, 6]], sampling, [0])
    assert any(EOS in completion.token_ids[:-1] for completion in completions)
    assert {completion.finish_reason for completion in completions} == {"length"}


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({name: value for name, value in {**content, **values}.items() if value is not None}))


def test_files_that_disagree_have_the_same_ends_and_padding_after_an_export(tmp_path: Path) -> None:
    source, target = write_model(tmp_path / "source", "llama"), tmp_path / "target"
    change(source / "config.json", eos_token_id=[7, 9], pad_token_id=9)
    change(source / "generation_config.json", eos_token_id=5)
    change(source / "tokenizer_config.json", pad_token=None)
    target.mkdir()
    write_checkpoint(target, source, HfWeights(load_model(source, torch.float32, "sdpa")), torch.float32)
    for folder in (source, target):
        tokenizer = load_tokenizer(folder)
        assert end_of_sequence_ids(folder, tokenizer) == (EOS, 5, 7, 9)
        assert tokenizer.pad_token_id == EOS


def test_a_model_without_an_end_in_the_tokenizer_pads_with_a_declared_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    change(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    change(folder / "config.json", eos_token_id=8, pad_token_id=None)
    change(folder / "generation_config.json", eos_token_id=6)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 6)
    assert end_of_sequence_ids(folder, tokenizer) == (6, 8)


def test_the_embedding_of_the_padding_token_is_trained(tmp_path: Path) -> None:
    """Some models end turns or documents with the token that pads, and torch would not train its embedding."""
    folder = write_model(tmp_path, "llama")
    change(folder / "config.json", pad_token_id=4)
    model = load_model(folder, torch.float32, "sdpa")
    model(input_ids=torch.tensor([[5, 4, 6]])).logits[0, 2].sum().backward()
    assert model.get_input_embeddings().weight.grad[4].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"chat_template": "a"}, {}),
        ({"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}, {}),
        ({"chat_template": "a"}, {"chat_template.jinja": "c"}),
        ({}, {"chat_template.jinja": "c", "additional_chat_templates/rag.jinja": "d"}),
        ({"chat_template": "a"}, {"additional_chat_templates/rag.jinja": "d"}),
        ({}, {}),
    ],
)
def test_templates_of_a_folder_are_those_of_transformers(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, str]
) -> None:
    folder = write_model(tmp_path, "llama")
    change(folder / "tokenizer_config.json", **settings)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    own = AutoTokenizer.from_pretrained(folder).chat_template
    assert chat_templates(folder) == ({} if own is None else own if isinstance(own, dict) else {"default": own})
