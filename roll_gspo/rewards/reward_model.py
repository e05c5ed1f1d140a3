"""`reward_model`: the score of a sequence classifier. The one reward that needs torch."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import RewardRequest, Verdict

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NORMALIZATIONS = ("none", "sigmoid", "softmax")
Sample = list[tuple[int, int]]  # token and token type, which tells BERT's response from its prompt


class RewardModel:
    """A logit of `AutoModelForSequenceClassification`, for the conversation that the response completes.

    Samples are padded on the right to the longest of a batch, and the score of each is what transformers computes for
    it alone, whatever else is in the batch: see `_pad_token`.

    Args:
        model_name_or_path: Hugging Face name or folder, with its tokenizer.
        dtype: of the parameters; `fp32`, `bf16` or `fp16`.
        device: `cpu`, `cuda` or `cuda:N`.
        max_length: tokens of prompt and response; of longer ones the last are read (behind the
            tokenizer's first, if it puts one there), and it is logged once. null: the
            model's `max_position_embeddings` or the tokenizer's `model_max_length`, the lower one.
        chat: the classifier's chat template over the prompt's messages and the response; else the text pair (prompt,
            response). The messages are the row's column `messages` if it has one, else one user message with the
            prompt's text, which holds the policy's chat template. null: true where the tokenizer has a template.
        normalize: `none` (the logit), `sigmoid` of it, or `softmax` over all labels.
        label: index of the logit; needed where the model has several.
        batch_size: samples in one forward pass.
        num_threads: of torch on a CPU; every worker process has as many.

    Raises:
        ConfigError: an argument is wrong, the model cannot be loaded, or it has no trained classification head.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        device: str = "cpu",
        max_length: int | None = None,
        chat: bool | None = None,
        normalize: Literal["none", "sigmoid", "softmax"] = "none",
        label: int | None = None,
        batch_size: int = 16,
        num_threads: int = 1,
    ) -> None:
        if dtype not in _DTYPES or normalize not in _NORMALIZATIONS:
            raise ConfigError(
                f"reward_model: dtype {dtype!r}, normalize {normalize!r}: expected one of {', '.join(_DTYPES)} and one "
                f"of {', '.join(_NORMALIZATIONS)}"
            )
        if min(batch_size, num_threads, 1 if max_length is None else max_length) < 1:
            raise ConfigError("reward_model: batch_size, num_threads and max_length must be positive; raise them")
        torch.set_num_threads(num_threads)
        self._device = _device(device)
        self._tokenizer = _tokenizer(model_name_or_path)
        self._model = _model(model_name_or_path, _DTYPES[dtype]).to(self._device)
        self._has_types = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self._label = _label(label, normalize, self._model.config.num_labels)
        self._normalize = normalize
        self._batch_size = batch_size
        text_config = self._model.config.get_text_config()
        self._pad_token_id: int | None = text_config.pad_token_id
        # The tokenizer's is the lower one where positions begin above 0, as RoBERTa's do.
        positions = text_config.to_dict().get("max_position_embeddings") or self._tokenizer.model_max_length
        if max_length is not None and max_length > positions:
            raise ConfigError(f"reward_model: max_length {max_length} is above the model's {positions}; lower it")
        self._max_length = max_length or min(positions, self._tokenizer.model_max_length)
        has_template = self._tokenizer.chat_template is not None
        if chat and not has_template:
            raise ConfigError("reward_model: chat: true, but the tokenizer has no chat template; set chat: false")
        self._chat = has_template if chat is None else chat
        self._has_truncated = False

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        return self.score_batch([RewardRequest(prompt, response, ground_truth, row)])[0]

    def score_batch(self, requests: Sequence[RewardRequest]) -> list[Verdict]:
        """One verdict a request, in order; any number of requests."""
        samples = [self._encode(request) for request in requests]
        # Of like length, so that little is computed for padding.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            scores |= dict(zip(indices, self._forward([samples[i] for i in indices]), strict=True))
        return [Verdict(scores[i]) for i in range(len(requests))]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Sample]) -> list[float]:
        """Scores of samples of any lengths, computed together."""
        padding = (self._pad_token(batch), 0)
        width = max(map(len, batch))
        padded = torch.tensor([[*s, *[padding] * (width - len(s))] for s in batch], device=self._device)  # [B, T, 2]
        lengths = torch.tensor([len(s) for s in batch], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()  # [B, T]
        types = {"token_type_ids": padded[..., 1]} if self._has_types else {}
        logits = self._model(input_ids=padded[..., 0], attention_mask=mask, **types).logits.float()  # [B, labels]
        if self._normalize == "softmax":
            logits = logits.softmax(-1)
        scores = logits[:, self._label]
        return (scores.sigmoid() if self._normalize == "sigmoid" else scores).tolist()

    def _pad_token(self, batch: Sequence[Sample]) -> int:
        """What to pad with, so that decoders find the last token of each sample.

        transformers takes the last one that is not `config.pad_token_id`, in a batch of one too; where that is unset,
        it takes the last of all and refuses larger batches. Then any token that the batch does not have will do.
        """
        if self._pad_token_id is not None:
            return self._pad_token_id
        used = {token for sample in batch for token, _ in sample}
        free = next(i for i in range(len(used) + 1) if i not in used)
        self._model.config.get_text_config().pad_token_id = free
        return free

    def _encode(self, request: RewardRequest) -> Sample:
        if self._chat:
            messages = [*_messages(request), {"role": "assistant", "content": request.response}]
            encoded = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        else:
            encoded = self._tokenizer(request.prompt, request.response, return_token_type_ids=True)
        ids = encoded["input_ids"]
        sample = list(zip(ids, encoded.get("token_type_ids", [0] * len(ids)), strict=True))
        if not sample:
            raise ValueError("reward_model: prompt and response have no token")
        if len(sample) > self._max_length:
            if not self._has_truncated:
                self._has_truncated = True
                logger.warning(
                    "reward_model: a sample of %d tokens is longer than max_length %d: only the last are read",
                    len(ids), self._max_length,
                )  # fmt: skip
            # An encoder's head reads its first token.
            starts = (self._tokenizer.cls_token_id, self._tokenizer.bos_token_id)
            first = sample[:1] if ids[0] in starts else []
            sample = [*first, *sample[len(sample) - self._max_length + len(first) :]]
        return sample


def _messages(request: RewardRequest) -> list[dict[str, str]]:
    messages = request.row.get("messages")
    if isinstance(messages, str):  # ROLL's files hold the list as a JSON string
        messages = json.loads(messages)
    if not messages:
        return [{"role": "user", "content": request.prompt}]
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"reward_model: messages must be a list of {{role, content}}, got {messages!r:.100}")
    return [dict(m) for m in messages]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"reward_model: device '{name}' is none; write cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"reward_model: device '{name}', but torch sees {count} GPUs; write cpu or another")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"reward_model: device '{name}' is not supported; write cpu, cuda or cuda:N")
    return device


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward_model: no tokenizer in model_name_or_path '{name}': {error}") from error


def _model(name: str, dtype: torch.dtype) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward_model: cannot load model_name_or_path '{name}': {error}") from error
    if missing := sorted(told["missing_keys"]):  # transformers would go on with random numbers
        raise ConfigError(
            f"reward_model: the checkpoint '{name}' lacks {', '.join(missing[:3])}; it is no trained sequence "
            "classifier, name one that is"
        )
    return model.eval()


def _label(label: int | None, normalize: str, num_labels: int) -> int:
    if label is None and num_labels > 1:
        raise ConfigError(f"reward_model: the model has {num_labels} labels; say which by label: 0 to {num_labels - 1}")
    if label is not None and not 0 <= label < num_labels:
        raise ConfigError(f"reward_model: label {label} is not among the model's 0 to {num_labels - 1}; correct it")
    if normalize == "softmax" and num_labels == 1:
        raise ConfigError("reward_model: normalize: softmax of a single label is always 1; write sigmoid or none")
    return label or 0
