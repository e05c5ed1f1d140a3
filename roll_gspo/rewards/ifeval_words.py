"""IFEval's instructions about words, lengths, language and case: `(response, **kwargs of the row) -> followed`.

Families and arguments are those of Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models",
arXiv 2311.07911. Comments say where a check deliberately differs from the published program.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# "don't" and "well-known" are one word each; the published program counts the pieces.
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
# The published program splits at every `***`, also at those that make text bold and italic.
_DIVIDER = re.compile(r"(?:(?<=\s)|^)\*(?: ?\*){2}(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:(?i:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|e\.g|i\.e)|[A-Z])\.$")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[」』”’）]*")
_LONGEST_ABBREVIATION = 4  # characters before its full stop
_MIN_LETTERS_FOR_LANGUAGE = 100
# A character that continues a word; Thai, Lao, Japanese and Chinese have no blanks between words.
_CONTINUES = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"
# What language identifiers tell apart and the instruction does not.
_VARIETIES = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "nn": "no"}

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, limit: count >= limit,
    "less than": lambda count, limit: count < limit,
    "at most": lambda count, limit: count <= limit,
    "more than": lambda count, limit: count > limit,
    "exactly": lambda count, limit: count == limit,
    "around": lambda count, limit: abs(count - limit) <= max(round(limit / 10), 1),
}


def holds(count: int, relation: str, limit: int) -> bool:
    """Whether a count is `at least`, `less than`, ... a limit.

    Raises:
        ValueError: there is no such relation.
    """
    if relation not in _RELATIONS:
        raise ValueError(f"unknown relation '{relation}'; expected one of {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](int(count), int(limit))


def keywords_exist(response: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, also inside a longer word (`run` in `running`)."""
    # Taken literally: the published program reads a keyword as a regular expression.
    return all(keyword.lower() in response.lower() for keyword in keywords)


def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """So many whole words are the keyword."""
    # The published program counts inside other words, too: "forward" as "war".
    return holds(len(_whole_words(keyword, response)), relation, frequency)


def forbidden_words_absent(response: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(_whole_words(word, response) for word in forbidden_words)


def _whole_words(word: str, text: str) -> list[str]:
    return re.findall(f"(?<!{_CONTINUES}){re.escape(word)}(?!{_CONTINUES})", text, re.IGNORECASE)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter occurs so often, large or small."""
    if len(letter) != 1:
        raise ValueError(f"letter is {letter!r}, not one character")
    return holds(response.lower().count(letter.lower()), let_relation, let_frequency)


def language_of(text: str) -> str | None:
    """ISO 639 code of the language of a text, None where it shows none (no letters, or too few)."""
    if not any(character.isalpha() for character in text):
        return None
    from py3langid import rank  # here: its model takes most of a second to load, and only this needs it

    ranking = rank(text)
    if ranking[0][1] == ranking[-1][1]:  # no known sequence of letters at all
        return None
    return next(_VARIETIES.get(name, name) for name, _ in ranking if name != "zxx")  # zxx: no linguistic content


def response_language(response: str, *, language: str) -> bool:
    """The text is in this language (`de`, `zh`, `zh-cn`)."""
    # A text in no language at all, e.g. only digits, passes in the published program.
    return language_of(response) == language.partition("-")[0].lower()


def sentences(text: str) -> int:
    """How many sentences; lines end them too. The published program asks nltk's Punkt model, which knows more
    abbreviations."""
    count = 0
    for line in text.splitlines():
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if _ABBREVIATION.search(line, max(start, end.start() - _LONGEST_ABBREVIATION), end.start() + 1):
                continue
            count += bool(re.search(r"\w", line[start : end.start()]))
            start = end.end()
        count += bool(re.search(r"\w", line[start:]))
    return count


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    return holds(sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, separated by `***`; a divider at the very start or end counts for nothing."""
    return are_filled(_DIVIDER.split(response), num_paragraphs)


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """So many words."""
    return holds(len(_WORD.findall(response)), relation, num_words)


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, separated by blank lines, one of which begins with the word."""
    # One list is counted and indexed; the published program indexes a list that still has the blank paragraphs.
    paragraphs = [paragraph for paragraph in _BLANK_LINE.split(response) if paragraph.strip()]
    if len(paragraphs) != int(num_paragraphs) or not 1 <= int(nth_paragraph) <= len(paragraphs):
        return False
    word = _WORD.search(paragraphs[int(nth_paragraph) - 1])
    return word is not None and word.group().lower() == first_word.strip().lower()


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words in capitals only (`I` and `A` are such words)."""
    return holds(sum(word.isupper() for word in _WORD.findall(response)), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    """English without a small letter."""
    return response.isupper() and _is_english(response)


def english_lowercase(response: str) -> bool:
    """English without a capital letter."""
    return response.islower() and _is_english(response)


def no_comma(response: str) -> bool:
    """Without commas, Chinese and Arabic ones included."""
    return not re.search("[,，、،]", response)


def _is_english(text: str) -> bool:
    # Identifiers are trained on ordinary spelling and guess on short texts; the published one asks about capitals.
    letters = [character for character in text if character.isalpha()]
    if len(letters) < _MIN_LETTERS_FOR_LANGUAGE:
        return all(letter.isascii() for letter in letters)
    return language_of(text.lower()) == "en"


def are_filled(parts: list[str], number: int) -> bool:
    """Whether so many parts have text and only the first and last may have none."""
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in parts) == int(number)
