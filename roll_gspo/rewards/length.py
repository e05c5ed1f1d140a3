"""`length`: what too long, too short and repetitive responses cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import Verdict

UNITS = ("words", "characters", "tokens")
# Chinese and Japanese are written without blanks: a character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


class Length:
    """Minus the penalties of a response, from 0 down; each is a component of the verdict.

    * `too_long`: 0 up to `max_length - overlong_buffer`, then linear to `penalty` at `max_length` and beyond (the soft
      overlong punishment of DAPO, arXiv 2503.14476, equation 13, in another unit).
    * `too_short`: linear from `penalty` at 0 to 0 at `min_length`.
    * `repetition`: `repetition_penalty` times the share of n-grams of words that occurred before (ROLL's rule workers
      have n 3 and penalty 0.5).

    This is a reward of its own, to be added to another by a weight, and sees the text. The algorithm's
    `overlong_buffer_length` punishes by the true number of generated tokens, after the reward, relative to
    `response_length`, and knows which responses were cut off: for a limit in tokens use that one. `unit: tokens` here
    tokenizes the text anew, which may give a few tokens more or less than were generated; it is for limits that differ
    between domains.

    Args:
        unit: `words`, `characters` or `tokens`; Chinese and Japanese characters are words.
        max_length: in units; None: no upper limit.
        overlong_buffer: in units, how long before `max_length` the penalty begins; 0: at once.
        min_length: in units; 0: no lower limit.
        penalty: of either limit, at the most.
        repetition_ngram: size of the n-grams; 0: repetition is free.
        repetition_penalty: at the most.
        tokenizer: folder with a `tokenizer.json`, or that file; for `tokens`.

    Raises:
        ConfigError: nothing is punished, or arguments contradict each other.
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
            raise ConfigError("length: nothing is punished; give max_length, min_length or repetition_ngram")
        if min(overlong_buffer, min_length, penalty, repetition_ngram, repetition_penalty) < 0:
            raise ConfigError("length: a limit or penalty is negative; penalties are given as positive numbers")
        if max_length is not None and max_length < max(1, min_length + overlong_buffer):
            raise ConfigError(
                f"length: max_length {max_length} is below min_length {min_length} + overlong_buffer {overlong_buffer}"
            )
        if overlong_buffer and max_length is None:
            raise ConfigError(f"length: overlong_buffer {overlong_buffer} acts with max_length only; give that, too")
        self._count = _counter(unit, tokenizer)
        self._max_length, self._buffer, self._min_length = max_length, overlong_buffer, min_length
        self._penalty = penalty
        self._ngram, self._repetition_penalty = repetition_ngram, repetition_penalty

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        parts: dict[str, float] = {}
        if self._max_length is not None or self._min_length:
            length = self._count(response)
            if self._max_length is not None:
                parts["too_long"] = -self._penalty * self._excess(length, self._max_length)
            if self._min_length:
                parts["too_short"] = -self._penalty * max(0.0, 1 - length / self._min_length)
        if self._ngram:
            parts["repetition"] = -self._repetition_penalty * repeated_share(response, self._ngram)
        return Verdict(sum(parts.values()), None, parts)

    def _excess(self, length: int, limit: int) -> float:
        """0 where it is not too long to 1 where it is past the limit."""
        if not self._buffer:
            return float(length > limit)
        return min(max(length - (limit - self._buffer), 0) / self._buffer, 1.0)


def repeated_share(text: str, size: int) -> float:
    """Share of the n-grams of a text's words, whatever their case, that have occurred before; 0 where it has none."""
    words = [word.lower() for word in _WORD.findall(text)]
    ngrams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _counter(unit: str, tokenizer: str | None) -> Callable[[str], int]:
    if unit not in UNITS:
        raise ConfigError(f"length: unit is '{unit}'; expected one of {', '.join(UNITS)}")
    if (unit == "tokens") != (tokenizer is not None):
        raise ConfigError("length: unit: tokens and a tokenizer belong together; give both or neither")
    if tokenizer is None:
        return len if unit == "characters" else lambda text: len(_WORD.findall(text))
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"length: tokenizer: there is no {path}; give a folder with a tokenizer.json, or that file")
    loaded = Tokenizer.from_file(str(path))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)
