"""`length`: penalties for responses that are too long, too short or repetitive."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import RewardOutput

UNITS = ("words", "characters", "tokens")
# Chinese and Japanese have no spaces between words, so each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


class Length:
    """Sum of the negative penalties of a response; 0 is best. Each penalty is a component of the output.

    * `too_long`: 0 up to `max_length - overlong_buffer`, then linear to `-penalty` at `max_length` and beyond (soft
      overlong punishment of DAPO, arXiv 2503.14476, equation 13, in the chosen unit).
    * `too_short`: linear from `-penalty` at length 0 to 0 at `min_length`.
    * `repetition`: `-repetition_penalty` times the fraction of repeated n-grams of words. ROLL's rule workers use
      3-grams and a penalty of 0.5.

    This reward sees only the text; add it to another one with a weight. For a limit in tokens, prefer the algorithm's
    `overlong_buffer_length`. It is applied after the reward, counts the generated tokens relative to `response_length`
    and knows which responses were truncated. `unit: tokens` is for limits that differ between domains: it tokenizes the
    text again, and its count may differ by a few tokens.

    Args:
        unit: `words`, `characters` or `tokens`. Each Chinese or Japanese character counts as a word.
        max_length: upper limit in units; None for none.
        overlong_buffer: units before `max_length` at which the penalty starts; 0 for a hard limit.
        min_length: lower limit in units; 0 for none.
        penalty: maximum penalty of either limit.
        repetition_ngram: size of the n-grams; 0 for no repetition penalty.
        repetition_penalty: maximum penalty for repetition.
        tokenizer: `tokenizer.json` or a folder that contains one; for `unit: tokens`.

    Raises:
        ConfigError: no penalty is configured, or the arguments contradict each other.
    """

    def __init__(
        self,
        unit: str = "words",
        max_length: int | None = None,
        overlong_buffer: int = 0,
        min_length: int = 0,
        penalty: float = 1.0,
        repetition_ngram: int = 0,
        repetition_penalty: float = 0.5,
        tokenizer: str | None = None,
    ) -> None:
        if max_length is None and not min_length and not repetition_ngram:
            raise ConfigError("length: no penalty is configured; set max_length, min_length or repetition_ngram")
        if min(overlong_buffer, min_length, penalty, repetition_ngram, repetition_penalty) < 0:
            raise ConfigError("length: a limit or penalty is negative; use positive numbers, also for penalties")
        if max_length is not None and max_length < max(1, min_length + overlong_buffer):
            raise ConfigError(
                f"length: max_length ({max_length}) is below min_length ({min_length}) + overlong_buffer "
                f"({overlong_buffer}); raise it"
            )
        if overlong_buffer and max_length is None:
            raise ConfigError(f"length: overlong_buffer ({overlong_buffer}) needs max_length; set both or neither")
        self._count = _counter(unit, tokenizer)
        self._max_length, self._buffer, self._min_length = max_length, overlong_buffer, min_length
        self._penalty = penalty
        self._ngram, self._repetition_penalty = repetition_ngram, repetition_penalty

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        penalties: dict[str, float] = {}
        if self._max_length is not None or self._min_length:
            length = self._count(response)
            if self._max_length is not None:
                penalties["too_long"] = -self._penalty * self._overlong_fraction(length, self._max_length)
            if self._min_length:
                penalties["too_short"] = -self._penalty * max(0.0, 1 - length / self._min_length)
        if self._ngram:
            penalties["repetition"] = -self._repetition_penalty * repeated_fraction(response, self._ngram)
        return RewardOutput(sum(penalties.values()), None, penalties)

    def _overlong_fraction(self, length: int, limit: int) -> float:
        """Return the fraction of the penalty: 0 up to the start of the buffer, 1 from the limit on."""
        if not self._buffer:
            return float(length > limit)
        return min(max(length - (limit - self._buffer), 0) / self._buffer, 1.0)


def repeated_fraction(text: str, size: int) -> float:
    """Return the fraction of word n-grams that repeat an earlier one, ignoring case; 0 if there are no n-grams.

    Args:
        text: text to split into words.
        size: number of words per n-gram.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    ngrams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _counter(unit: str, tokenizer: str | None) -> Callable[[str], int]:
    if unit not in UNITS:
        raise ConfigError(f"length: unit '{unit}' is unknown; use one of {', '.join(UNITS)}")
    if (unit == "tokens") != (tokenizer is not None):
        raise ConfigError("length: unit: tokens and tokenizer need each other; set both or neither")
    if tokenizer is None:
        return len if unit == "characters" else lambda text: len(_WORD.findall(text))
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"length: tokenizer: {path} does not exist; give a tokenizer.json or its folder")
    loaded = Tokenizer.from_file(str(path))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)
