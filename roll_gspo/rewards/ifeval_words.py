"""Checks of IFEval's instructions about words, lengths, language and case.

Each check is a function `(response, **kwargs of the row) -> bool` that returns True if the response follows the
instruction. Instructions and arguments are those of Zhou et al. 2023, "Instruction-Following Evaluation for Large
Language Models", arXiv 2311.07911. Comments mark deliberate differences from the published implementation.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# "don't" and "well-known" are one word each; the published implementation splits them.
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
# The published implementation splits at every `***`, including markup of bold italic text.
_DIVIDER = re.compile(r"(?:(?<=\s)|^)\*(?: ?\*){2}(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:(?i:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|e\.g|i\.e)|[A-Z])\.$")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[」』”’）]*")
_MAX_ABBREVIATION_CHARS = 4  # without the full stop
_MIN_LETTERS_FOR_LANGUAGE = 100
# A character that continues a word. Thai, Lao, Japanese and Chinese have no spaces between words.
_WORD_CHARACTER = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"
# Varieties that py3langid distinguishes and the instruction does not.
_VARIETIES = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "nn": "no"}

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, limit: count >= limit,
    "less than": lambda count, limit: count < limit,
    "at most": lambda count, limit: count <= limit,
    "more than": lambda count, limit: count > limit,
    "exactly": lambda count, limit: count == limit,
    "around": lambda count, limit: abs(count - limit) <= max(round(limit / 10), 1),
}


def compare_count(count: int, relation: str, limit: int) -> bool:
    """Return whether `count` is `at least`, `less than`, ... `limit`.

    Raises:
        ValueError: the relation is unknown.
    """
    if relation not in _RELATIONS:
        raise ValueError(f"unknown relation '{relation}'; use one of {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](int(count), int(limit))


def keywords_exist(response: str, *, keywords: list[str]) -> bool:
    """Check that every keyword occurs, possibly inside a longer word (`run` in `running`)."""
    # The published implementation treats a keyword as a regular expression.
    return all(keyword.lower() in response.lower() for keyword in keywords)


def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """Check the number of times the keyword occurs as a whole word."""
    # The published implementation also counts parts of words, e.g. "war" in "forward".
    return compare_count(len(_whole_words(keyword, response)), relation, frequency)


def forbidden_words_absent(response: str, *, forbidden_words: list[str]) -> bool:
    """Check that none of the words occurs as a whole word."""
    return not any(_whole_words(word, response) for word in forbidden_words)


def _whole_words(word: str, text: str) -> list[str]:
    return re.findall(f"(?<!{_WORD_CHARACTER}){re.escape(word)}(?!{_WORD_CHARACTER})", text, re.IGNORECASE)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Check the number of times the letter occurs, ignoring case."""
    if len(letter) != 1:
        raise ValueError(f"letter is {letter!r}, not one character; correct the row")
    return compare_count(response.lower().count(letter.lower()), let_relation, let_frequency)


def detect_language(text: str) -> str | None:
    """Return the ISO 639 code of the language of a text, or None if it cannot be detected."""
    if not any(character.isalpha() for character in text):
        return None
    from py3langid import rank  # imported here, because loading its model takes most of a second

    ranking = rank(text)
    if ranking[0][1] == ranking[-1][1]:  # the text has no known sequence of letters
        return None
    return next(_VARIETIES.get(name, name) for name, _ in ranking if name != "zxx")  # zxx: no linguistic content


def response_language(response: str, *, language: str) -> bool:
    """Check that the text is in the language (`de`, `zh`, `zh-cn`)."""
    # In the published implementation, text without a language (e.g. only digits) passes.
    return detect_language(response) == language.partition("-")[0].lower()


def count_sentences(text: str) -> int:
    """Return the number of sentences; a newline also ends a sentence."""
    # The published implementation uses the Punkt model of nltk, which knows more abbreviations.
    count = 0
    for line in text.splitlines():
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if _ABBREVIATION.search(line, max(start, end.start() - _MAX_ABBREVIATION_CHARS), end.start() + 1):
                continue
            count += bool(re.search(r"\w", line[start : end.start()]))
            start = end.end()
        count += bool(re.search(r"\w", line[start:]))
    return count


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    """Check the number of sentences."""
    return compare_count(count_sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Check for exactly `num_paragraphs` paragraphs separated by `***`; a divider at the start or end is ignored."""
    return has_nonempty_parts(_DIVIDER.split(response), num_paragraphs)


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """Check the number of words."""
    return compare_count(len(_WORD.findall(response)), relation, num_words)


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Check for exactly `num_paragraphs` paragraphs separated by blank lines, and the first word of one of them."""
    # The published implementation counts without empty paragraphs, but indexes with them.
    paragraphs = [paragraph for paragraph in _BLANK_LINE.split(response) if paragraph.strip()]
    if len(paragraphs) != int(num_paragraphs) or not 1 <= int(nth_paragraph) <= len(paragraphs):
        return False
    word = _WORD.search(paragraphs[int(nth_paragraph) - 1])
    return word is not None and word.group().lower() == first_word.strip().lower()


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Check the number of all-caps words, including `I` and `A`."""
    return compare_count(sum(word.isupper() for word in _WORD.findall(response)), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    """Check for English text in capital letters."""
    return response.isupper() and _is_english(response)


def english_lowercase(response: str) -> bool:
    """Check for English text in lowercase letters."""
    return response.islower() and _is_english(response)


def no_comma(response: str) -> bool:
    """Check that there are no commas, including Chinese and Arabic ones."""
    return not re.search("[,，、،]", response)


def _is_english(text: str) -> bool:
    # Language detection expects ordinary case and is unreliable on short texts. The published implementation runs it on
    # text in capitals.
    letters = [character for character in text if character.isalpha()]
    if len(letters) < _MIN_LETTERS_FOR_LANGUAGE:
        return all(letter.isascii() for letter in letters)
    return detect_language(text.lower()) == "en"


def has_nonempty_parts(parts: list[str], number: int) -> bool:
    """Return whether exactly `number` parts are nonempty; only the first and the last part may be empty."""
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in parts) == int(number)
