"""`ifeval`: how many of a row's verifiable instructions a response follows, without a model."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards import ifeval_layout as layout
from roll_gspo.rewards import ifeval_words as words
from roll_gspo.rewards.base import Verdict
from roll_gspo.rewards.final_answer import after_thinking

REWARD_TYPES = ("soft", "hard")

FAMILIES: dict[str, Callable[..., bool]] = {
    "keywords:existence": words.keywords_exist,
    "keywords:frequency": words.keyword_frequency,
    "keywords:forbidden_words": words.forbidden_words_absent,
    "keywords:letter_frequency": words.letter_frequency,
    "language:response_language": words.response_language,
    "length_constraints:number_sentences": words.number_sentences,
    "length_constraints:number_paragraphs": words.number_paragraphs,
    "length_constraints:number_words": words.number_words,
    "length_constraints:nth_paragraph_first_word": words.nth_paragraph_first_word,
    "detectable_content:number_placeholders": layout.number_placeholders,
    "detectable_content:postscript": layout.postscript,
    "detectable_format:number_bullet_lists": layout.number_bullet_lists,
    "detectable_format:constrained_response": layout.constrained_response,
    "detectable_format:number_highlighted_sections": layout.number_highlighted_sections,
    "detectable_format:multiple_sections": layout.multiple_sections,
    "detectable_format:json_format": layout.json_format,
    "detectable_format:title": layout.title,
    "combination:two_responses": layout.two_responses,
    "combination:repeat_prompt": layout.repeat_prompt,
    "startend:end_checker": layout.end_checker,
    "startend:quotation": layout.quotation,
    "change_case:capital_word_frequency": words.capital_word_frequency,
    "change_case:english_capital": words.english_capital,
    "change_case:english_lowercase": words.english_lowercase,
    "punctuation:no_comma": words.no_comma,
}


@dataclass(frozen=True)
class _Tulu:
    """What a `func_name` of Tulu's and ROLL's rows stands for: a family, its arguments' other names, fixed ones."""

    check: Callable[..., bool]
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


TULU: dict[str, _Tulu] = {
    "verify_keywords": _Tulu(words.keywords_exist, {"keyword_list": "keywords"}),
    "verify_keyword_frequency": _Tulu(
        words.keyword_frequency, {"word": "keyword", "N": "frequency"}, {"relation": "exactly"}
    ),
    "validate_forbidden_words": _Tulu(words.forbidden_words_absent),
    "verify_letter_frequency": _Tulu(words.letter_frequency, {"N": "let_frequency"}, {"let_relation": "exactly"}),
    "validate_response_language": _Tulu(words.response_language),
    "verify_paragraph_count": _Tulu(words.number_paragraphs, {"N": "num_paragraphs"}),
    "validate_word_constraint": _Tulu(words.number_words, {"N": "num_words", "quantifier": "relation"}),
    "verify_sentence_constraint": _Tulu(words.number_sentences, {"N": "num_sentences", "quantifier": "relation"}),
    "validate_paragraphs": _Tulu(words.nth_paragraph_first_word, {"N": "num_paragraphs", "i": "nth_paragraph"}),
    "verify_postscript": _Tulu(layout.postscript),
    "validate_placeholders": _Tulu(layout.number_placeholders, {"N": "num_placeholders"}),
    "verify_bullet_points": _Tulu(layout.number_bullet_lists, {"N": "num_bullets"}),
    "validate_title": _Tulu(layout.title),
    "validate_choice": _Tulu(layout.choice),
    "validate_highlighted_sections": _Tulu(layout.number_highlighted_sections, {"N": "num_highlights"}),
    "validate_sections": _Tulu(layout.multiple_sections, {"N": "num_sections", "section_splitter": "section_spliter"}),
    "validate_json_format": _Tulu(layout.json_format),
    "validate_repeat_prompt": _Tulu(layout.repeat_prompt, {"original_prompt": "prompt_to_repeat"}),
    "validate_two_responses": _Tulu(layout.two_responses),
    "validate_uppercase": _Tulu(words.english_capital),
    "validate_lowercase": _Tulu(words.english_lowercase),
    "validate_frequency_capital_words": _Tulu(
        words.capital_word_frequency, {"N": "capital_frequency", "quantifier": "capital_relation"}
    ),
    "validate_end": _Tulu(layout.end_checker),
    "validate_quotation": _Tulu(layout.quotation),
    "validate_no_commas": _Tulu(words.no_comma),
}


class IfEval:
    """How many of the row's instructions the response follows; what precedes `</think>` does not count.

    A row has IFEval's columns `instruction_id_list` and `kwargs` (lists, or JSON), or has them in its ground truth, or
    its ground truth is an object with `func_name` and its arguments, as in Tulu's and ROLL's rows. The verdict's
    components are the shares of followed instructions by name.

    Args:
        reward_type: `soft`: the share that is followed; `hard`: 1 where all are, else 0.
        loose: also try the response without its first line, its last line and its asterisks (the paper's loose
            accuracy), so that an introductory sentence does not cost the instruction.

    Raises:
        ConfigError: another `reward_type`.
        ValueError: (at a row) an instruction is unknown, lacks an argument, or has one too many.
    """

    def __init__(self, reward_type: str = "hard", loose: bool = False) -> None:
        if reward_type not in REWARD_TYPES:
            raise ConfigError(f"reward_type: ifeval has {' and '.join(REWARD_TYPES)}, not '{reward_type}'")
        self._is_soft = reward_type == "soft"
        self._loose = loose
        words.language_of("The model is loaded now, not on the clock of a sample.")

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        answer = after_thinking(response).strip()
        texts = [text for text in (_loose_texts(answer) if self._loose else [answer]) if text.strip()]
        followed: dict[str, list[bool]] = {}
        for name, check, arguments in _instructions(ground_truth, row):
            # An empty response follows nothing, not even an interdiction.
            followed.setdefault(name, []).append(any(check(text, **arguments) for text in texts))
        results = [result for of_name in followed.values() for result in of_name]
        share = sum(results) / len(results)
        parts = {name: sum(of_name) / len(of_name) for name, of_name in followed.items()}
        return Verdict(share if self._is_soft else float(all(results)), None, parts)


def _loose_texts(response: str) -> Iterator[str]:
    lines = response.split("\n")
    for text in dict.fromkeys("\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])):
        yield text
        yield text.replace("*", "")


def _instructions(
    ground_truth: str, row: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[..., bool], dict[str, Any]]]:
    """(name, check, arguments) of every instruction of a row, one at least."""
    source = row if row.get("instruction_id_list") is not None else _read(ground_truth, "ground_truth")
    if isinstance(source, list) and len(source) == 1:
        source = source[0]
    if not isinstance(source, Mapping):
        raise ValueError(
            "ifeval: the row has no instruction_id_list and kwargs, and its ground_truth is no object with them or "
            f"with func_name, but {ground_truth[:80]!r}"
        )
    if "func_name" in source:
        yield _tulu_instruction(dict(source))
        return
    names = _read(source.get("instruction_id_list", source.get("instruction_id")), "instruction_id_list")
    kwargs = _read(source.get("kwargs"), "kwargs")
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError(f"ifeval: instruction_id_list is {names!r}, not a list of names")
    if not isinstance(kwargs, Sequence) or len(kwargs) != len(names):
        raise ValueError(f"ifeval: kwargs {kwargs!r} are not one object for each of the {len(names)} instructions")
    for name, arguments in zip(names, kwargs, strict=True):
        if name not in FAMILIES:
            raise ValueError(f"ifeval: unknown instruction '{name}'{did_you_mean(name, list(FAMILIES))}")
        yield name, FAMILIES[name], _checked(name, FAMILIES[name], _read(arguments, f"kwargs of {name}") or {})


def _tulu_instruction(source: dict[str, Any]) -> tuple[str, Callable[..., bool], dict[str, Any]]:
    name = source.pop("func_name")
    if name not in TULU:
        raise ValueError(f"ifeval: unknown func_name '{name}'{did_you_mean(str(name), list(TULU))}")
    entry = TULU[name]
    arguments = {entry.names.get(key, key): value for key, value in source.items()}
    return name, entry.check, _checked(name, entry.check, {**arguments, **entry.fixed})


def _checked(name: str, check: Callable[..., bool], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are given; data sets fill those of other instructions with nulls or NaN."""
    taken = {key: parameter for key, parameter in inspect.signature(check).parameters.items() if key != "response"}
    given = {key: value for key, value in arguments.items() if value is not None and value == value}
    if missing := sorted(taken.keys() - given.keys()):
        raise ValueError(f"ifeval: '{name}' lacks {', '.join(missing)} (its kwargs: {dict(given)}); correct the row")
    if unknown := sorted(given.keys() - taken.keys()):
        raise ValueError(
            f"ifeval: '{name}' has no argument {', '.join(unknown)} (it has: {', '.join(taken) or 'none'})"
        )
    return {key: _typed(value, taken[key].annotation, f"{key} of '{name}'") for key, value in given.items()}


def _typed(value: Any, annotation: str, where: str) -> Any:
    """A value as a check takes it. A text in the place of a list would be taken apart into its letters."""
    if annotation != "str":
        value = _read(value, where)
    if annotation == "list[str]":
        fits = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
        expected = "a list of texts"
    elif annotation == "int":
        fits, expected = isinstance(value, int | float) and value == int(value), "a whole number"
    else:
        fits, expected = isinstance(value, str), "a text"
    if not fits:
        raise ValueError(f"ifeval: {where} is {value!r}, not {expected}; correct the row")
    return value


def _read(value: Any, where: str) -> Any:
    """What a column holds, which may be the JSON of it (or Python's notation of it, as Tulu's newer rows have)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value) if re.match(r"\s*[\[{]", value) else value
    except (ValueError, SyntaxError):
        raise ValueError(f"ifeval: {where} is neither a list nor its JSON: {value[:80]!r}") from None
