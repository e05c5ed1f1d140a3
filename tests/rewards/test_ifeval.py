"""`ifeval`: a followed and a broken response for every instruction, and the formats of rows."""

from __future__ import annotations

import json
import math
import time

import pytest

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.ifeval import INSTRUCTIONS, TULU_INSTRUCTIONS, IfEval
from roll_gspo.rewards.ifeval_words import count_sentences, detect_language

GERMAN = "Der Hund läuft durch den Garten und bellt, weil die Katze auf dem Baum sitzt."
ENGLISH = "The dog runs through the garden and barks because the cat sits in the tree."

# instruction, kwargs, responses that follow it, responses that do not
CASES: list[tuple[str, dict, list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["Cat", "c++"]},
        ["A CAT that writes c++", "cats and C++."],
        ["a cat", "cat ccc", "dog and c++"],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War is war.", "war, war and war"],
        ["war and forward", "warward war", "peace"],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "less than"},
        ["war", "forward forward"],
        ["war war"],
    ),
    (
        "keywords:frequency",
        {"keyword": "天气", "frequency": 2, "relation": "at least"},
        ["今天天气很好，明天天气不好。"],
        ["今天天气很好。"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["天气", "AI"]},
        ["今天很好 said"],
        ["今天天气很好", "使用AI技术"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat", "dog."]},
        ["a category of dogs"],
        ["A Cat.", "the dog. No"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["Eve sees"],
        ["Eve", ""],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        ["no", "one!"],
        ["two!!"],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH, "123 456", "!!!"]),
    (
        "language:response_language",
        {"language": "hi"},
        ["मेरा नाम राम है और मैं दिल्ली में रहता हूँ।"],
        [ENGLISH],
    ),
    ("language:response_language", {"language": "zh-cn"}, ["我是中国人，我住在北京的一个小房子里。"], [GERMAN]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", 'He said "Go." She went. They left.', "A heading\nA line\nAnother line"],
        ["One. Two.", "Dr. Smith paid 3.50 dollars, i.e. little. He left.", "One."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["Mr. Jones met J. Doe at 5.30 there.", "Only one"],
        ["One. Two."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["First\n***\nSecond", "***\nFirst\n\n***\n\nSecond ***very*** bold\n***", "One * * * two"],
        ["First\n\nSecond", "First\n***\n\n***\nSecond", "First\n***\nSecond\n***\nThird"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["I don't like well-known cats", "one, two; three -- four!"],
        ["I don't like it"[:-3], "well-known don't"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["Intro\n\n\n\n**weekend**, at last", '\n\nIntro\n\n"Weekend" it is'],
        ["Intro\n\nWeekends", "Weekend\n\nIntro", "Intro\n\nWeekend\n\nmore", "Intro\nWeekend"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "x"},
        [],
        ["x"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] lives in [your address]"],
        ["[name]", "[] [ ]", "[a](http://x.org) and [b](http://y.org)", "[[name]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        [
            "Text.\n\nP.S. More",
            "Text\n**P.S.** more",
            "Text\np. s. more",
            "P.S. - more",
            '"P.S. (more)"',
            "P.S.: “more”",
        ],
        ["Text", "Text\nP.S.", "see P.S. below", "Text\nP.P.S. more", "P.Story"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Text\nP.P.S. More", "Text\nP.P.S More"],
        ["Text\nP.S. More"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "Intro\n- one\n  - two\n---\nEnd", "* **bold** one\n* two\n* * *"],
        ["* one", "* one\n* two\n* three", "-5 degrees\n-6 degrees", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "I think: My answer is maybe."],
        ["yes", "My answer is yes", "My answer is yes. My answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and **two**", "***one*** *two words*", "这是**重点**内容，也是**难点**。"],
        ["*one*", "* one\n* two", "** and ** and **", "2 * 3 * 4", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        [
            "SECTION 1\na\nSECTION 2\nb",
            "**SECTION I**\na\n## SECTION II\nb",
            "SECTION 1\nSECTION 2\nSECTION 3",
            '"SECTION 1: a\nSECTION 2: b"',
        ],
        ["SECTION 1\nas SECTION 2 says", "SECTION A\nSECTION B", "SECTION 1"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', "[1, 2]", '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```'],
        ['{"a": 1', "5", '"text"', 'Here: {"a": 1}', "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<Poem of joy>>\nText"], ["<Poem>", "<<>>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["One\n******\nTwo", "One******Two******"],
        ["One", "One\n******\nOne", "One******Two******Three", "One***Two"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a  poem.\nNow."},
        ["Write a poem. Now.\n\nRoses are red.", "WRITE A POEM. NOW. Here"],
        ["Roses. Write a poem. Now.", "Write a poem. Now.", "Write a song. Now. Here"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["Text. Any questions?", 'Text. "any questions?" \n'],
        ["Any questions? No.", "Text."],
    ),
    ("startend:quotation", {}, ['"All of it."', "“All of it.”"], ['"Half" of it', '"', '""', "'All'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and IBM", "I WANT it"],
        ["NASA", "Nasa Ibm"],
    ),
    (
        "change_case:english_capital",
        {},
        [ENGLISH.upper(), "HELLO 123!", "1. LAVA LAMP LEGENDS\n2. SOLAR CIRCUIT\n3. NEON TIDE"],
        [ENGLISH, "Hello There", GERMAN.upper(), "123", "ÄÖÜ"],
    ),
    (
        "change_case:english_lowercase",
        {},
        [ENGLISH.lower(), "hello 123!"],
        [ENGLISH, "hello There", GERMAN.lower(), "123"],
    ),
    ("punctuation:no_comma", {}, ["No; none."], ["Yes, one", "一，二", "一、二"]),
]


@pytest.fixture(scope="module")
def rule() -> IfEval:
    return IfEval()


def score(rule: IfEval, response: str, names: object, kwargs: object) -> float:
    return rule("", response, "", instruction_id_list=names, kwargs=kwargs, id="1").score


def test_all_25_instructions_have_cases():
    assert len(INSTRUCTIONS) == 25 == len(TULU_INSTRUCTIONS)
    assert {name for name, _, followed, broken in CASES if followed and broken} == set(INSTRUCTIONS)


@pytest.mark.parametrize(("name", "kwargs", "followed", "broken"), CASES, ids=[case[0] for case in CASES])
def test_instruction_scores_1_if_followed_else_0(rule, name, kwargs, followed, broken):
    assert [r for r in followed if score(rule, r, [name], [kwargs]) != 1] == []
    assert [r for r in broken if score(rule, r, [name], [kwargs]) != 0] == []


@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_empty_response_scores_0(rule, name):
    kwargs = next(kwargs for other, kwargs, _, _ in CASES if other == name)
    assert score(rule, "", [name], [kwargs]) == score(rule, "<think>a</think> \n", [name], [kwargs]) == 0


TULU_CASES = [
    ({"func_name": "verify_keywords", "keyword_list": ["cat"]}, "a cat", "a dog"),
    ({"func_name": "verify_keyword_frequency", "word": "cat", "N": 1}, "a cat", "cat cat"),
    ({"func_name": "validate_forbidden_words", "forbidden_words": ["cat"]}, "a dog", "a cat"),
    ({"func_name": "verify_letter_frequency", "letter": "a", "N": 2}, "banal", "banana"),
    ({"func_name": "validate_response_language", "language": "de"}, GERMAN, ENGLISH),
    ({"func_name": "verify_paragraph_count", "N": 2}, "a\n* * *\nb", "a"),
    ({"func_name": "validate_word_constraint", "N": 3, "quantifier": "around"}, "a b", "a"),
    ({"func_name": "verify_sentence_constraint", "N": 1, "quantifier": "at most"}, "A.", "A b. C d."),
    ({"func_name": "validate_paragraphs", "N": 2, "first_word": "b", "i": 2}, "a\n\nb", "b\n\na"),
    ({"func_name": "verify_postscript", "postscript_marker": "P.S."}, "a\nP.S. b", "a"),
    ({"func_name": "validate_placeholders", "N": 1}, "[a]", "a"),
    ({"func_name": "verify_bullet_points", "N": 1}, "* a", "* a\n* b"),
    ({"func_name": "validate_title"}, "<<a>>", "a"),
    ({"func_name": "validate_choice", "options": ["yes", "no"]}, "yes", "e"),
    ({"func_name": "validate_highlighted_sections", "N": 1}, "*a*", "a"),
    ({"func_name": "validate_sections", "N": 1, "section_splitter": "Day"}, "Day 1\na", "a"),
    ({"func_name": "validate_json_format"}, "{}", "a"),
    ({"func_name": "validate_repeat_prompt", "original_prompt": "Say a."}, "Say a. a", "a"),
    ({"func_name": "validate_two_responses"}, "a******b", "a"),
    ({"func_name": "validate_uppercase"}, "A", "a"),
    ({"func_name": "validate_lowercase"}, "a", "A"),
    ({"func_name": "validate_frequency_capital_words", "N": 1, "quantifier": "at least"}, "AB", "a"),
    ({"func_name": "validate_end", "end_phrase": "bye"}, "a bye", "a"),
    ({"func_name": "validate_quotation"}, '"a"', "a"),
    ({"func_name": "validate_no_commas"}, "a", "a, b"),
]


@pytest.mark.parametrize(("truth", "followed", "broken"), TULU_CASES, ids=[case[0]["func_name"] for case in TULU_CASES])
def test_rows_of_tulu_with_func_name_are_scored(rule, truth, followed, broken):
    truth = json.dumps({"N": None, "quantifier": None, "end_phrase": None, **truth})
    assert rule("", followed, truth).score == 1 and rule("", broken, truth).score == 0
    assert {json.loads(json.dumps(case[0]))["func_name"] for case in TULU_CASES} == set(TULU_INSTRUCTIONS)


NAMES, KWARGS = ["punctuation:no_comma", "detectable_format:title"], [{}, {"num_words": None, "frequency": math.nan}]


@pytest.mark.parametrize(
    ("ground_truth", "row"),
    [
        ("", {"instruction_id_list": NAMES, "kwargs": KWARGS}),
        ("ignored", {"instruction_id_list": json.dumps(NAMES), "kwargs": json.dumps(KWARGS)}),
        ("", {"instruction_id_list": NAMES, "kwargs": [json.dumps(k) for k in KWARGS]}),
        (json.dumps({"instruction_id_list": NAMES, "kwargs": KWARGS}), {}),
        (json.dumps({"instruction_id_list": NAMES, "kwargs": KWARGS}), {"instruction_id_list": None}),
        (repr([{"instruction_id": NAMES, "kwargs": [None, {}]}]), {}),
    ],
)
def test_instructions_are_read_from_columns_or_ground_truth(ground_truth, row):
    soft, hard = IfEval("soft"), IfEval("hard")
    half = soft("", "no title here", ground_truth, **row)
    assert half.score == 0.5 and half.components == {NAMES[0]: 1.0, NAMES[1]: 0.0} and half.answer is None
    assert hard("", "no title here", ground_truth, **row).score == 0
    assert hard("", "<think>yes, one</think>\n<<Title>>", ground_truth, **row).score == 1


def test_loose_ignores_first_line_last_line_and_asterisks():
    strict, loose = IfEval(), IfEval(loose=True)
    wrapped = "Sure, here it is:\n**My text**\nI hope, it helps!"
    for names, kwargs in ([["punctuation:no_comma"], [{}]], [["startend:end_checker"], [{"end_phrase": "text"}]]):
        assert score(strict, wrapped, names, kwargs) == 0 and score(loose, wrapped, names, kwargs) == 1
    assert score(loose, "a, b\nc, d\ne, f", ["punctuation:no_comma"], [{}]) == 0


def test_repeated_instruction_is_counted_each_time():
    kwargs = [{"keywords": ["a"]}, {"keywords": ["b"]}]
    output = IfEval("soft")("", "a", "", instruction_id_list=["keywords:existence"] * 2, kwargs=kwargs)
    assert output.score == 0.5 and output.components == {"keywords:existence": 0.5}


@pytest.mark.parametrize(
    ("ground_truth", "row", "match"),
    [
        (
            "",
            {"instruction_id_list": ["keywords:existance"], "kwargs": [{}]},
            "'keywords:existance'.*keywords:existence",
        ),
        ("", {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "'keywords:existence' lacks keywords"),
        ("", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]}, "no_comma' .*num_words"),
        ("", {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "cat"}]}, "keywords of .*'cat'"),
        ("", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, r"kwargs \[\] are not 1"),
        ("", {"instruction_id_list": ["punctuation:no_comma"]}, "kwargs None"),
        ("", {"instruction_id_list": [], "kwargs": []}, r"instruction_id_list is \[\]"),
        ("", {"instruction_id_list": "[broken", "kwargs": []}, r"instruction_id_list .*'\[broken'"),
        ("forty-two", {}, "instruction_id_list and kwargs.*'forty-two'"),
        (json.dumps({"func_name": "verify_keyword", "N": 1}), {}, "func_name 'verify_keyword'.*'verify_keywords'"),
        (json.dumps({"func_name": "verify_keywords", "N": 1}), {}, "'verify_keywords' lacks keywords"),
        (json.dumps({"func_name": "validate_choice", "options": "yes, no"}), {}, "options of .*'yes, no'"),
        (json.dumps({"func_name": "verify_bullet_points", "N": "many"}), {}, "num_bullets of .*'many'"),
        (
            json.dumps({"func_name": "validate_word_constraint", "N": 1, "quantifier": "roughly"}),
            {},
            "relation 'roughly'.*at least",
        ),
    ],
)
def test_invalid_row_raises(rule, ground_truth, row, match):
    with pytest.raises(ValueError, match=match):
        rule("", "a response", ground_truth, **row)


def test_unknown_reward_type_raises():
    with pytest.raises(ConfigError, match=r"reward_type 'medium'.*soft, hard"):
        IfEval("medium")


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("...", 0), ("One", 1), ("One.Two", 1), ("Really?! Yes.", 2), ("我来了。你呢？好", 3), ("A.\n\nB.", 2)],
)
def test_count_sentences(text, count):
    assert count_sentences(text) == count


def test_many_initials_are_counted_in_linear_time():
    start = time.process_time()
    assert count_sentences("A. " * 10_000) == 1
    assert time.process_time() - start < 5  # 20 s if every abbreviation is searched from the start of the line


@pytest.mark.parametrize(("text", "language"), [(ENGLISH, "en"), (GERMAN, "de"), ("12 + 3", None), ("", None)])
def test_detect_language(text, language):
    assert detect_language(text) == language
