"""`ifeval`: verifiable instructions of a row, checked by rules without a model."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.config.reward_table import SHIPPED_REWARDS
from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards import ifeval_layout as layout
from roll_gspo.rewards import ifeval_words as words
from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import text_after_thinking

REWARD_TYPES = SHIPPED_REWARDS["ifeval"].block_arguments["reward_type"]

INSTRUCTIONS: dict[str, Callable[..., bool]] = {
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
class _TuluCheck:
    """Check that a `func_name` in rows of Tulu and ROLL stands for.

    Attributes:
        check: function that checks a response.
        names: argument names of `check` by their names in the row.
        fixed: arguments of `check` that the row does not have.
    """

    check: Callable[..., bool]
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


TULU_INSTRUCTIONS: dict[str, _TuluCheck] = {
    "verify_keywords": _TuluCheck(words.keywords_exist, {"keyword_list": "keywords"}),
    "verify_keyword_frequency": _TuluCheck(
        words.keyword_frequency, {"word": "keyword", "N": "frequency"}, {"relation": "exactly"}
    ),
    "validate_forbidden_words": _TuluCheck(words.forbidden_words_absent),
    "verify_letter_frequency": _TuluCheck(words.letter_frequency, {"N": "let_frequency"}, {"let_relation": "exactly"}),
    "validate_response_language": _TuluCheck(words.response_language),
    "verify_paragraph_count": _TuluCheck(words.number_paragraphs, {"N": "num_paragraphs"}),
    "validate_word_constraint": _TuluCheck(words.number_words, {"N": "num_words", "quantifier": "relation"}),
    "verify_sentence_constraint": _TuluCheck(words.number_sentences, {"N": "num_sentences", "quantifier": "relation"}),
    "validate_paragraphs": _TuluCheck(words.nth_paragraph_first_word, {"N": "num_paragraphs", "i": "nth_paragraph"}),
    "verify_postscript": _TuluCheck(layout.postscript),
    "validate_placeholders": _TuluCheck(layout.number_placeholders, {"N": "num_placeholders"}),
    "verify_bullet_points": _TuluCheck(layout.number_bullet_lists, {"N": "num_bullets"}),
    "validate_title": _TuluCheck(layout.title),
    "validate_choice": _TuluCheck(layout.choice),
    "validate_highlighted_sections": _TuluCheck(layout.number_highlighted_sections, {"N": "num_highlights"}),
    "validate_sections": _TuluCheck(
        layout.multiple_sections, {"N": "num_sections", "section_splitter": "section_spliter"}
    ),
    "validate_json_format": _TuluCheck(layout.json_format),
    "validate_repeat_prompt": _TuluCheck(layout.repeat_prompt, {"original_prompt": "prompt_to_repeat"}),
    "validate_two_responses": _TuluCheck(layout.two_responses),
    "validate_uppercase": _TuluCheck(words.english_capital),
    "validate_lowercase": _TuluCheck(words.english_lowercase),
    "validate_frequency_capital_words": _TuluCheck(
        words.capital_word_frequency, {"N": "capital_frequency", "quantifier": "capital_relation"}
    ),
    "validate_end": _TuluCheck(layout.end_checker),
    "validate_quotation": _TuluCheck(layout.quotation),
    "validate_no_commas": _TuluCheck(words.no_comma),
}


class IfEval:
    """Score the instructions that the response follows. Text before the last `</think>` is ignored.

    A row has IFEval's columns `instruction_id_list` and `kwargs` (lists or their JSON), or its ground truth contains
    them. Rows of Tulu and ROLL have a ground truth with `func_name` and its arguments instead. The components of the
    output are the fractions of followed instructions by name.

    Args:
        reward_type: `soft` for the fraction of followed instructions; `hard` for 1 if all are followed, else 0.
        loose: if True, an instruction is also followed if it holds after the first line, the last line or all asterisks
            are removed. This is the loose accuracy of the paper, which tolerates an introductory sentence.

    Raises:
        ConfigError: `reward_type` is unknown.
        ValueError: an instruction of a row is unknown, or its arguments are missing, unknown or of the wrong type.
    """

    def __init__(self, reward_type: str = "hard", loose: bool = False) -> None:
        if reward_type not in REWARD_TYPES:
            raise ConfigError(f"ifeval: reward_type '{reward_type}' is unknown; use one of {', '.join(REWARD_TYPES)}")
        self._is_soft = reward_type == "soft"
        self._loose = loose
        words.detect_language("Load the model now, so that its load time does not count against the first sample.")

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        answer = text_after_thinking(prompt, response).strip()
        texts = [text for text in (_loose_texts(answer) if self._loose else [answer]) if text.strip()]
        followed: dict[str, list[bool]] = {}
        for name, check, arguments in _instructions(ground_truth, row):
            # An empty response follows no instruction, not even one that forbids something.
            followed.setdefault(name, []).append(any(check(text, **arguments) for text in texts))
        results = [result for of_name in followed.values() for result in of_name]
        fraction = sum(results) / len(results)
        components = {name: sum(of_name) / len(of_name) for name, of_name in followed.items()}
        return RewardOutput(fraction if self._is_soft else float(all(results)), None, components)


def _loose_texts(response: str) -> Iterator[str]:
    lines = response.split("\n")
    for text in dict.fromkeys("\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])):
        yield text
        yield text.replace("*", "")


def _instructions(
    ground_truth: str, row: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[..., bool], dict[str, Any]]]:
    """Yield (name, check, arguments) of each instruction of a row, at least one."""
    source = row if row.get("instruction_id_list") is not None else _parse(ground_truth, "ground_truth")
    if isinstance(source, list) and len(source) == 1:
        source = source[0]
    if not isinstance(source, Mapping):
        raise ValueError(
            "ifeval: the row has no instruction_id_list and kwargs, and its ground_truth contains neither them nor "
            f"func_name ({ground_truth[:80]!r}); correct the row"
        )
    if "func_name" in source:
        yield _tulu_instruction(dict(source))
        return
    names = _parse(source.get("instruction_id_list", source.get("instruction_id")), "instruction_id_list")
    kwargs = _parse(source.get("kwargs"), "kwargs")
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError(f"ifeval: instruction_id_list is {names!r}, not a list of names; correct the row")
    if not isinstance(kwargs, Sequence) or len(kwargs) != len(names):
        raise ValueError(
            f"ifeval: kwargs {kwargs!r} are not {len(names)} objects, one per instruction; correct the row"
        )
    for name, arguments in zip(names, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            raise ValueError(f"ifeval: unknown instruction '{name}'{did_you_mean(name, list(INSTRUCTIONS))}")
        check = INSTRUCTIONS[name]
        yield name, check, _validate_arguments(name, check, _parse(arguments, f"kwargs of {name}") or {})


def _tulu_instruction(source: dict[str, Any]) -> tuple[str, Callable[..., bool], dict[str, Any]]:
    name = source.pop("func_name")
    if name not in TULU_INSTRUCTIONS:
        raise ValueError(f"ifeval: unknown func_name '{name}'{did_you_mean(str(name), list(TULU_INSTRUCTIONS))}")
    entry = TULU_INSTRUCTIONS[name]
    arguments = {entry.names.get(key, key): value for key, value in source.items()}
    return name, entry.check, _validate_arguments(name, entry.check, {**arguments, **entry.fixed})


def _validate_arguments(name: str, check: Callable[..., bool], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are set; datasets fill those of other instructions with null or NaN."""
    parameters = {key: parameter for key, parameter in inspect.signature(check).parameters.items() if key != "response"}
    given = {key: value for key, value in arguments.items() if value is not None and value == value}
    if missing := sorted(parameters.keys() - given.keys()):
        raise ValueError(f"ifeval: '{name}' lacks {', '.join(missing)} (kwargs: {dict(given)}); correct the row")
    if unknown := sorted(given.keys() - parameters.keys()):
        known = ", ".join(parameters) or "none"
        raise ValueError(f"ifeval: '{name}' has no argument {', '.join(unknown)} (known: {known}); correct the row")
    return {key: _convert(value, parameters[key].annotation, f"{key} of '{name}'") for key, value in given.items()}


def _convert(value: Any, annotation: str, where: str) -> Any:
    """Return a value with the annotated type. A string is no list, because a check would iterate over its letters."""
    if annotation != "str":
        value = _parse(value, where)
    if annotation == "list[str]":
        valid = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
        expected = "a list of strings"
    elif annotation == "int":
        valid, expected = isinstance(value, int | float) and value == int(value), "an integer"
    else:
        valid, expected = isinstance(value, str), "a string"
    if not valid:
        raise ValueError(f"ifeval: {where} is {value!r}, not {expected}; correct the row")
    return value


def _parse(value: Any, where: str) -> Any:
    """Return the value of a column, decoded from JSON or from a Python literal (as in newer rows of Tulu)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value) if re.match(r"\s*[\[{]", value) else value
    except (ValueError, SyntaxError):
        raise ValueError(
            f"ifeval: {where} is neither a list nor the JSON of one ({value[:80]!r}); correct it"
        ) from None
