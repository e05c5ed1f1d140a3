"""Checks of IFEval's instructions about layout; see `ifeval_words` for their signature and source."""

from __future__ import annotations

import json
import re

from roll_gspo.rewards.ifeval_words import has_nonempty_parts

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# Excludes `[]` and the text of links, which the published implementation counts.
_PLACEHOLDER = re.compile(r"\[(?=[^\[\]\n]*\w)[^\[\]\n]*\](?!\()")
# Markdown requires a space after the marker. The published implementation also counts `---` and `-5 degrees`.
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+(?![*+-][ \t]*(?:[*+-][ \t]*)*$)\S", re.MULTILINE)
# Excludes asterisks inside a word (`2*3*4`), except between Chinese characters, which have no spaces around emphasis.
_HIGHLIGHT = re.compile(r"(?<![*0-9A-Za-z])(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")
_FENCE = re.compile(r"^```(?:json)?[ \t]*\n?(.*?)\n?[ \t]*```$", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<<(?=[^\n<>]*\w)[^\n<>]*>>")
_LINE_START = r"^[ \t>#*_(\"“]*"  # may have markdown or an opening quotation mark
_QUOTES = (('"', '"'), ("“", "”"))


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """Check for at least `num_placeholders` placeholders in square brackets."""
    return len(_PLACEHOLDER.findall(response)) >= int(num_placeholders)


def postscript(response: str, *, postscript_marker: str) -> bool:
    """Check for a line that begins with the marker (`P.S.`, `P.P.S`), followed by text."""
    # The published implementation also accepts the marker within a line, or without text after it.
    letters = [
        re.escape(character) + r"\s?" for character in postscript_marker.strip().rstrip(".") if not character.isspace()
    ]
    return re.search(_LINE_START + "".join(letters) + r"(?!\w)\W*\w", response, re.I | re.M) is not None


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Check for exactly `num_bullets` bullet points."""
    return len(_BULLET.findall(response)) == int(num_bullets)


def constrained_response(response: str) -> bool:
    """Check for exactly one of "My answer is yes.", "My answer is no." and "My answer is maybe."."""
    # The published implementation accepts a response that has all three.
    return sum(option in response for option in _OPTIONS) == 1


def choice(response: str, *, options: list[str]) -> bool:
    """Check that the response is one of the options (rows of Tulu only)."""
    return response.strip() in [option.strip() for option in options]


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """Check for at least `num_highlights` highlighted sections: `*section*` or `**section**`."""
    return sum(1 for _ in _HIGHLIGHT.finditer(response)) >= int(num_highlights)


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """Check for at least `num_sections` lines that begin with the splitter and a number, Arabic or Roman."""
    # The published implementation also counts references to "Section 1" within a line.
    pattern = rf"{_LINE_START}{re.escape(section_spliter.strip())}\s*(?:\d+|[IVXLC]+\b)"
    return len(re.findall(pattern, response, re.MULTILINE)) >= int(num_sections)


def json_format(response: str) -> bool:
    """Check that the whole response is one JSON object or list, with or without a code fence."""
    # In the published implementation, a single number or string passes, too.
    fenced = _FENCE.match(response.strip())
    try:
        return isinstance(json.loads(fenced[1] if fenced else response), dict | list)
    except (ValueError, RecursionError):
        return False


def title(response: str) -> bool:
    """Check for a title in double angle brackets: `<<title>>`."""
    return _TITLE.search(response) is not None


def two_responses(response: str) -> bool:
    """Check for two different answers separated by six asterisks."""
    parts = response.split("******")
    nonempty = [part.strip() for part in parts if part.strip()]
    return has_nonempty_parts(parts, 2) and nonempty[0] != nonempty[1]


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """Check that the response begins with the prompt, followed by an answer; whitespace and case are ignored."""
    # The published implementation accepts a repeated prompt without an answer.
    answer, prompt = (" ".join(text.lower().split()) for text in (response, prompt_to_repeat))
    return answer.startswith(prompt) and len(answer) > len(prompt)


def end_checker(response: str, *, end_phrase: str) -> bool:
    """Check that the response ends with the phrase, optionally followed by a closing quotation mark."""
    return response.strip().rstrip('"”').strip().lower().endswith(end_phrase.strip().rstrip('"”').strip().lower())


def quotation(response: str) -> bool:
    """Check that the whole response is in double quotation marks, straight or curved."""
    text = response.strip()
    return len(text) > 2 and any(text.startswith(opening) and text.endswith(closing) for opening, closing in _QUOTES)
