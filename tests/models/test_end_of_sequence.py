"""End-of-sequence ids: one reader of config.json, generation_config.json and tokenizer for all engines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import EOS, write_model

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import end_of_sequence_ids
from roll_gspo.models.folder_check import has_end_of_sequence
from roll_gspo.strategies.base import ModelSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer


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
