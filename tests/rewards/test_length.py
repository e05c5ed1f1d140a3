"""`length`: limits in three units, and repetition penalty."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.length import Length, repeated_fraction


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


@pytest.mark.parametrize(("count", "score"), [(0, 0), (80, 0), (85, -0.5), (90, -1), (100, -2), (500, -2)])
def test_too_long_is_linear_over_the_buffer(count, score):
    output = Length(max_length=90 if count <= 90 else 100, overlong_buffer=10, penalty=1 if count <= 90 else 2)(
        "", words(count), ""
    )
    assert output.score == pytest.approx(score) and output.components == {"too_long": output.score}


@pytest.mark.parametrize(("count", "score"), [(10, 0), (11, -1)])
def test_limit_without_buffer_is_hard(count, score):
    assert Length(max_length=10)("", words(count), "").score == score


@pytest.mark.parametrize(("count", "score"), [(0, -0.5), (5, -0.25), (10, 0), (100, 0)])
def test_too_short_is_linear_from_length_0(count, score):
    output = Length(min_length=10, penalty=0.5)("", words(count), "")
    assert output.score == pytest.approx(score) and set(output.components) == {"too_short"}


def test_units_count_words_characters_and_tokens(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "a", "b", "!"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a b! 我们"  # words: a, b!, two Chinese ones; seven characters; tokens: a, b, ! and [UNK]
    for unit, folder, length in (("words", None, 4), ("characters", None, 7), ("tokens", str(tmp_path), 4)):
        assert Length(unit, length, tokenizer=folder)("", text, "").score == 0
        assert Length(unit, length - 1, tokenizer=folder)("", text, "").score == -1


@pytest.mark.parametrize(
    ("text", "size", "fraction"),
    [
        ("a b c", 3, 0),
        ("a b", 3, 0),
        ("", 3, 0),
        ("a b A B", 2, 1 / 3),
        ("x x x x x", 1, 0.8),
        ("我我我我", 2, 2 / 3),
        ("la " * 100, 3, 97 / 98),
    ],
)
def test_repetition_is_the_fraction_of_repeated_ngrams(text, size, fraction):
    assert repeated_fraction(text, size) == pytest.approx(fraction)
    assert Length(repetition_ngram=size, repetition_penalty=0.5)("", text, "").score == pytest.approx(-fraction / 2)


def test_score_is_the_sum_of_its_components():
    output = Length(max_length=3, min_length=1, repetition_ngram=1, penalty=2)("", "a a a a", "")
    assert output.components == {"too_long": -2, "too_short": 0, "repetition": -0.375}
    assert output.score == -2.375


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "max_length, min_length or repetition_ngram"),
        ({"max_length": -5}, r"max_length \(-5\)"),
        ({"max_length": 10, "penalty": -1}, "penalty is negative"),
        (
            {"max_length": 10, "min_length": 8, "overlong_buffer": 5},
            r"\(10\).*min_length \(8\) \+ overlong_buffer \(5\)",
        ),
        ({"min_length": 5, "overlong_buffer": 5}, r"overlong_buffer \(5\) .*max_length"),
        ({"max_length": 10, "unit": "lines"}, "unit 'lines' .*words, characters, tokens"),
        ({"max_length": 10, "unit": "tokens"}, "unit: tokens and tokenizer"),
        ({"max_length": 10, "tokenizer": "x"}, "unit: tokens and tokenizer"),
        ({"max_length": 10, "unit": "tokens", "tokenizer": "no/such"}, "tokenizer: no/such"),
    ],
)
def test_wrong_arguments_raise(arguments, match):
    with pytest.raises(ConfigError, match=f"^length: .*{match}"):
        Length(**arguments)
