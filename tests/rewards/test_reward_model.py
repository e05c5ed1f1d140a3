"""`reward_model` with tiny, randomly initialized models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from roll_gspo.errors import ConfigError
from roll_gspo.models.tiny import SPECIAL_TOKENS, byte_tokenizer, save
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
from roll_gspo.rewards.reward_model import RewardModel

PAD, EOS = 0, 1
SHAPE = {
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
DECODER = {**SHAPE, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": EOS}
MODELS = {
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config(**DECODER, pad_token_id=PAD, num_labels=1)),
    "qwen3_pad_is_eos": (Qwen3ForSequenceClassification, Qwen3Config(**DECODER, pad_token_id=EOS, num_labels=1)),
    "qwen3_without_pad": (Qwen3ForSequenceClassification, Qwen3Config(**DECODER, pad_token_id=None, num_labels=1)),
    "bert": (BertForSequenceClassification, BertConfig(**SHAPE, pad_token_id=PAD, num_labels=1)),
    "three_labels": (Qwen2ForSequenceClassification, Qwen2Config(**DECODER, pad_token_id=PAD, num_labels=3)),
    "no_classifier": (Qwen3ForCausalLM, Qwen3Config(**DECODER, pad_token_id=PAD)),
}
REQUESTS = [
    RewardRequest("2+2=", "4", "4"),
    RewardRequest("2+2=", "5, for two and two are always five, as everybody knows", "4"),
    RewardRequest("Say nothing.", "", ""),
    RewardRequest("A much longer question? " * 4, "Yes.", "", {"messages": [{"role": "user", "content": "Short?"}]}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of each model."""
    folder = tmp_path_factory.mktemp("reward_models")
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # so that every token changes the score
        save(model, byte_tokenizer(), folder / name)
    return folder


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_pad_is_eos", "qwen3_without_pad", "bert"])
def test_score_equals_transformers_and_does_not_depend_on_the_batch(models: Path, name: str, chat: bool) -> None:
    reward = RewardModel(str(models / name), chat=chat)
    alone = [reward(r.prompt, r.response, r.ground_truth, **r.row).score for r in REQUESTS]
    plain = AutoModelForSequenceClassification.from_pretrained(models / name).eval()
    tokenizer = byte_tokenizer()
    for request, score in zip(REQUESTS, alone, strict=True):
        question = request.row["messages"][0]["content"] if request.row else request.prompt
        text = f"<|user|>{question}<|assistant|>{request.response}<|end|>"
        encoded = tokenizer(text) if chat else tokenizer(request.prompt, request.response, return_token_type_ids=True)
        assert chat or set(encoded["token_type_ids"]) == ({0, 1} if request.response else {0})
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if name == "bert" and not chat else []))
        with torch.no_grad():
            logits = plain(**{column: torch.tensor([encoded[column]]) for column in names}).logits
        assert score == pytest.approx(logits.item(), abs=1e-5)
    assert len({round(score, 3) for score in alone}) == len(alone), "the samples differ"
    batched = [output.score for output in reward.score_batch(REQUESTS)]
    assert batched == pytest.approx(alone, abs=1e-5)
    small = RewardModel(str(models / name), chat=chat, batch_size=2)
    assert [o.score for o in small.score_batch(REQUESTS[::-1])][::-1] == pytest.approx(alone, abs=1e-5)


def test_normalize_and_label_select_the_score(models: Path) -> None:
    path, request = str(models / "three_labels"), REQUESTS[1]
    logits = [RewardModel(path, label=i).score_batch([request])[0].score for i in range(3)]
    expected = torch.tensor(logits).softmax(-1)[2].item()
    assert RewardModel(path, label=2, normalize="softmax").score_batch([request])[0].score == pytest.approx(expected)
    sigmoid = RewardModel(path, label=0, normalize="sigmoid").score_batch([request])[0].score
    assert sigmoid == pytest.approx(torch.tensor(logits[0]).sigmoid().item())


def test_long_sample_keeps_its_last_tokens(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModel(str(models / "qwen2"), chat=False, max_length=8)
    long, short = RewardRequest("p" * 300, "the end.", ""), RewardRequest("", "the end.", "")
    assert reward.score_batch([long])[0].score == pytest.approx(reward.score_batch([short])[0].score, abs=1e-5)
    assert "308" in caplog.text and "max_length 8" in caplog.text


def test_long_sample_keeps_the_first_token_of_an_encoder(models: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.cls_token = "<|user|>"
    save(BertForSequenceClassification.from_pretrained(models / "bert"), tokenizer, tmp_path)
    reward = RewardModel(str(tmp_path), chat=False, max_length=9)
    long, short = (RewardRequest(f"<|user|>{prompt}", "the end.", "") for prompt in ("p" * 200, ""))
    assert reward.score_batch([long])[0].score == pytest.approx(reward.score_batch([short])[0].score, abs=1e-5)


def test_messages_may_be_json(models: Path) -> None:
    reward = RewardModel(str(models / "qwen2"))
    as_list, as_text = REQUESTS[3], RewardRequest("x", "Yes.", "", {"messages": '[{"role":"user","content":"Short?"}]'})
    assert reward.score_batch([as_list])[0] == reward.score_batch([as_text])[0]


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("no_classifier", {}, r"model_name_or_path '.*no_classifier'.*score\.weight"),
        ("absent", {}, "model_name_or_path '.*absent'"),
        ("three_labels", {}, "3 labels.*0 to 2"),
        ("three_labels", {"label": 3}, "label 3 .*0 to 2"),
        ("qwen2", {"normalize": "softmax"}, "normalize: softmax"),
        ("qwen2", {"dtype": "float8"}, "dtype is 'float8'"),
        ("qwen2", {"device": "cuda:99"}, "device 'cuda:99'"),
        ("qwen2", {"max_length": 257}, r"max_length \(257\) .*256"),
    ],
)
def test_wrong_models_and_arguments_raise(models: Path, name: str, arguments: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=f"^reward_model: .*{match}"):
        RewardModel(str(models / name), **arguments)


def test_pool_runs_the_model_in_a_worker_process(models: Path) -> None:
    path = str(models / "qwen2")
    spec = reward_spec("reward_model", {"model_name_or_path": path}, "rewards.x")
    with RewardPool(spec, 1, 60.0, "rewards.x", start_timeout_s=240.0) as pool:
        scores = [result.score for result in pool.score(REQUESTS)]
    assert scores == pytest.approx([o.score for o in RewardModel(path).score_batch(REQUESTS)], abs=1e-5)
