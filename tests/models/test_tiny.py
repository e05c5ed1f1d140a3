from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_gspo.models import tiny
from roll_gspo.models.warm_start import Demonstration, train


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_transformers_loads_a_tiny_model(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.build_model(tiny.TINY_MODELS[name], seed=0), tiny.byte_tokenizer()
    tiny.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path).encode("12+3=")])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert 0.5e6 < loaded.num_parameters() < 5e6
    assert len(tokenizer) == loaded.config.vocab_size, "every id that can be sampled can be decoded"
    assert loaded.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["347+86=", "naïve – 数学 🙂\n\t", "x²"])
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_marks_turns_with_special_tokens() -> None:
    tokenizer = tiny.byte_tokenizer()
    conversation = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    open_end = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
    assert open_end == "<|user|>1+1=<|assistant|>"
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert whole == "<|user|>1+1=<|assistant|>2<|end|>"
    assert len(tokenizer.encode(whole)) == 2 + 4 + 1 + 1


def test_weights_depend_only_on_the_seed_and_restore_the_random_state() -> None:
    spec = tiny.TINY_MODELS["tiny_qwen3"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny.build_model(spec, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = tiny.build_model(spec, seed=7).state_dict(), tiny.build_model(spec, seed=8).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])


def test_fingerprint_changes_with_every_input() -> None:
    assert tiny.fingerprint({"a": 1, "b": 2}) == tiny.fingerprint({"b": 2, "a": 1})
    assert tiny.fingerprint({"a": 1}) != tiny.fingerprint({"a": 2})


def test_warm_start_teaches_answers_and_not_prompts() -> None:
    tokenizer = tiny.byte_tokenizer()
    model = tiny.build_model(tiny.TINY_MODELS["tiny_qwen3"], seed=0)
    end = tokenizer.eos_token_id
    lessons = [
        Demonstration(tuple(tokenizer.encode(question)), (*tokenizer.encode(answer), end))
        for question, answer in (("a", "xy"), ("bb", "z"))
    ]
    seen: list[tuple[int, int]] = []
    loss = train(
        model,
        lessons,
        steps=100,
        batch_size=4,
        learning_rate=2e-3,
        seed=0,
        pad=tokenizer.pad_token_id,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert loss < 0.1 and seen[-1] == (100, 100)
    answer = model.generate(torch.tensor([tokenizer.encode("a")]), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(answer[0, 1:]) == "xy<|end|>"
