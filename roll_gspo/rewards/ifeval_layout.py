"""IFEval's instructions about layout: `(response, **kwargs of the row) -> followed`; see `ifeval_words`."""

from __future__ import annotations

import json
import re

from roll_gspo.rewards.ifeval_words import are_filled

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# Not `[]`, not the text of a link: the published program counts both.
_PLACEHOLDER = re.compile(r"\[(?=[^\[\]\n]*\w)[^\[\]\n]*\](?!\()")
# With a blank after the sign, as markdown has it: the published program counts `---` and `-5 degrees`, too.
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+(?![*+-][ \t]*(?:[*+-][ \t]*)*$)\S", re.MULTILINE)
# Not inside a word (`2*3*4`); Chinese has its emphasis between characters, without blanks.
_HIGHLIGHT = re.compile(r"(?<![*0-9A-Za-z])(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")
_FENCE = re.compile(r"^```(?:json)?[ \t]*\n?(.*?)\n?[ \t]*```$", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<<(?=[^\n<>]*\w)[^\n<>]*>>")
_LINE_START = r"^[ \t>#*_(\"“]*"  # markdown, or what a quotation begins with
_QUOTES = (('"', '"'), ("“", "”"))


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many `[placeholders]`."""
    return len(_PLACEHOLDER.findall(response)) >= int(num_placeholders)


def postscript(response: str, *, postscript_marker: str) -> bool:
    """A line that begins with the marker (`P.S.`, `P.P.S`) and goes on."""
    # The published program finds it in the middle of a line, and alone.
    letters = [
        re.escape(character) + r"\s?" for character in postscript_marker.strip().rstrip(".") if not character.isspace()
    ]
    return re.search(_LINE_START + "".join(letters) + r"(?!\w)\W*\w", response, re.I | re.M) is not None


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many bullet points."""
    return len(_BULLET.findall(response)) == int(num_bullets)


def constrained_response(response: str) -> bool:
    """It holds one of the three sentences "My answer is yes.", "... no." and "... maybe."."""
    # One: the published program accepts a response that gives all three.
    return sum(option in response for option in _OPTIONS) == 1


def choice(response: str, *, options: list[str]) -> bool:
    """It is one of the options, nothing more; of Tulu's rows."""
    return response.strip() in [option.strip() for option in options]


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many `*sections*` or `**sections**`."""
    return sum(1 for _ in _HIGHLIGHT.finditer(response)) >= int(num_highlights)


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many lines that begin with the splitter and a number, Arabic or Roman."""
    # At the start of a line: the published program counts what the text says about "Section 1", too.
    pattern = rf"{_LINE_START}{re.escape(section_spliter.strip())}\s*(?:\d+|[IVXLC]+\b)"
    return len(re.findall(pattern, response, re.MULTILINE)) >= int(num_sections)


def json_format(response: str) -> bool:
    """All of it is one JSON object or list, in a code fence or not."""
    # A bare number or word passes in the published program, although nothing is wrapped in it.
    fenced = _FENCE.match(response.strip())
    try:
        return isinstance(json.loads(fenced[1] if fenced else response), dict | list)
    except (ValueError, RecursionError):
        return False


def title(response: str) -> bool:
    """It has a `<<title>>`."""
    return _TITLE.search(response) is not None


def two_responses(response: str) -> bool:
    """Two different answers, separated by six asterisks."""
    parts = response.split("******")
    filled = [part.strip() for part in parts if part.strip()]
    return are_filled(parts, 2) and filled[0] != filled[1]


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the prompt, word for word, and goes on; blanks and case do not matter."""
    # It goes on: the published program takes the repeated prompt for an answer.
    said, prompt = (" ".join(text.lower().split()) for text in (response, prompt_to_repeat))
    return said.startswith(prompt) and len(said) > len(prompt)


def end_checker(response: str, *, end_phrase: str) -> bool:
    """It ends with the phrase; a closing quotation mark may follow."""
    return response.strip().rstrip('"”').strip().lower().endswith(end_phrase.strip().rstrip('"”').strip().lower())


def quotation(response: str) -> bool:
    """All of it stands in double quotation marks, straight or curved."""
    text = response.strip()
    return len(text) > 2 and any(text.startswith(opening) and text.endswith(closing) for opening, closing in _QUOTES)
