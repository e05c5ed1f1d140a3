from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roll_gspo.tracking.token_texts import TokenTexts

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ("Ġthe", "Ġ", "éī", "12", "ðŁ", "ĺĢ", "âĢ", "Ķâ")


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are some words, digits and pieces of characters: as in Qwen and Llama 3."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, *(w for w in WORDS if w not in BYTES), "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Build a tokenizer like that of Llama 2: the decoder drops the first space, and bytes are separate tokens."""
    pieces = ["<unk>", "</s>", "▁a", "▁", "b", "▁▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(pieces)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


BYTE_LEVEL, SENTENCE_PIECE = byte_level(), sentence_piece()


def texts(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return TokenTexts(lambda tokens: str(tokenizer.decode(list(tokens))))(ids)


def ids_of(text: str) -> list[int]:
    """One token a byte."""
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    return [int(str(BYTE_LEVEL.convert_tokens_to_ids(symbol))) for symbol in symbols]


def test_character_of_several_tokens_is_the_text_of_the_last() -> None:
    assert texts(BYTE_LEVEL, ids_of("a😀é!")) == ["a", "", "", "", "😀", "", "é", "!"]


def test_character_that_begins_in_the_token_before_is_whole() -> None:
    ids = [int(str(BYTE_LEVEL.convert_tokens_to_ids(token))) for token in ("âĢ", "Ķâ", "Ģ", "Ķ", "<|end|>")]
    assert BYTE_LEVEL.decode(ids) == "——<|end|>"
    assert texts(BYTE_LEVEL, ids) == ["", "—", "", "—", "<|end|>"]


def test_space_before_a_token_is_its_own() -> None:
    ids = [2, 2, 4, 5, 2, 1]
    assert "".join(texts(SENTENCE_PIECE, ids)).lstrip() == str(SENTENCE_PIECE.decode(ids)).lstrip()
    assert texts(SENTENCE_PIECE, ids)[1:4] == [" a", "b", "  "]


@given(st.text(max_size=30))
def test_texts_joined_are_the_response(text: str) -> None:
    ids = ids_of(text) if text else []
    found = texts(BYTE_LEVEL, ids)
    assert len(found) == len(ids) and "".join(found) == text


@example([94, 94, 94, 94, 94, 94, 259, 94, 94])
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60))
def test_texts_of_tokens_that_make_no_sense_are_one_each(ids: list[int]) -> None:
    found = texts(BYTE_LEVEL, ids)
    assert len(found) == len(ids)
    whole = str(BYTE_LEVEL.decode(ids))
    assert "".join(found).replace("\ufffd", "") == whole.replace("\ufffd", "")


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCE_PIECE], ids=["byte level", "sentence piece"])
def test_no_token_has_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts(tokenizer, []) == []
