"""Parsers of the verdict in a judge's answer. They read only the answer, never the prompt of the judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.final_answer import text_after_thinking

Parser = Callable[[str], float | None]
"""Function that maps a judge's answer to a score, or to None if it has no verdict."""

_SCORE = re.compile(
    r"\bscore[\s*_`\"']*(?:[:=]|\bis\b)[\s*_`\"'\[(<]*(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?", re.IGNORECASE
)
_BARE_SCORE = re.compile(r"[\s*_`]*(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?[\s*_`.]*")
_BLANK = r"[^\w\n]"
_VERDICT_LINE = re.compile(
    rf"^{_BLANK}*(?:(?:final{_BLANK}+)?(?:verdict|answer|judge?ment|decision|correct){_BLANK}*(?:is)?{_BLANK}*)?"
    rf"(yes|no){_BLANK}*$",
    re.IGNORECASE | re.MULTILINE,
)
_FIRST_WORD = re.compile(r"^\W*(yes|no)\b", re.IGNORECASE)
_LAST_WORD = re.compile(r"\b(yes|no)\W*$", re.IGNORECASE)
_JSON = "json:"
_TEN = 10.0


def make_parser(name: str) -> Parser:
    """Return the parser with the given name, or a parser for a regular expression.

    * `yes_no`: 1 for yes and 0 for no, from the last line that contains only a verdict ("Verdict: yes"), else from the
      first word of the answer, else from its last word.
    * `score_0_10`: number in the last "score: 7" (or "7/10"), divided by 10.
    * `json:KEY`: number or boolean under KEY in the last JSON object that has it.
    * A regular expression with one group: number in the group of the last match.

    Text before the last `</think>` is ignored.

    Raises:
        ConfigError: `name` is neither a parser nor a regular expression with one group.
    """
    named: dict[str, Parser] = {"yes_no": _yes_no, "score_0_10": _score_0_10}
    parse = named.get(name) or (_json_parser(name.removeprefix(_JSON)) if name.startswith(_JSON) else None)
    if parse is None:
        parse = _regex_parser(name)
    return lambda answer: _finite(parse(text_after_thinking("", answer)))


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _yes_no(answer: str) -> float | None:
    lines = _VERDICT_LINE.findall(answer)
    words = lines[-1:] or [m[1] for m in (_FIRST_WORD.search(answer), _LAST_WORD.search(answer)) if m]
    return float(words[0].lower() == "yes") if words else None


def _score_0_10(answer: str) -> float | None:
    matches = _SCORE.findall(answer)
    bare = _BARE_SCORE.fullmatch(answer)
    if not matches and bare is None:
        return None
    number, scale = matches[-1] if matches else (bare[1], bare[2] or "") if bare else ("", "")
    score = float(number)
    return score / _TEN if 0 <= score <= _TEN and scale in ("", "10") else None


def _json_parser(key: str) -> Parser:
    decoder = json.JSONDecoder()

    def parse(answer: str) -> float | None:
        score, start = None, answer.find("{")
        while start >= 0:
            try:
                value, end = decoder.raw_decode(answer, start)
            except (ValueError, RecursionError):
                value, end = None, start + 1
            if isinstance(value, dict) and isinstance(value.get(key), int | float):
                score = float(value[key])
            start = answer.find("{", end)
        return score

    if not key:
        raise ConfigError("llm_judge: parser 'json:' has no key; use e.g. json:score")
    return parse


def _regex_parser(pattern: str) -> Parser:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"llm_judge: parser '{pattern}' is no regular expression ({error}); correct it") from error
    if regex.groups != 1:
        raise ConfigError(
            f"llm_judge: parser '{pattern}' has {regex.groups} groups; use yes_no, score_0_10, json:KEY or a regular "
            "expression with one group"
        )

    def parse(answer: str) -> float | None:
        groups = regex.findall(answer)
        try:
            return float(groups[-1]) if groups else None
        except ValueError:
            return None

    return parse
