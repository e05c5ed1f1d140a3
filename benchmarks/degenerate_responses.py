"""CPU seconds that each reward needs for degenerate responses of 20,000 characters.

    python benchmarks/degenerate_responses.py [--characters 20000] [--limit 0.2]

Policies produce such texts: one token without end, deep nesting, and expressions that no machine can evaluate. The
table shows seconds per form and reward, the slowest form first. The last line is the slowest time. Exit status 1 if it
exceeds `--limit`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from roll_gspo.rewards.code_sandbox import extract_program
from roll_gspo.rewards.exact_match import ExactMatch
from roll_gspo.rewards.format import Format
from roll_gspo.rewards.ifeval import INSTRUCTIONS, IfEval
from roll_gspo.rewards.length import Length
from roll_gspo.rewards.llm_judge.prompt import JudgePrompt
from roll_gspo.rewards.math_rule import MathRule
from roll_gspo.rewards.multiple_choice import MultipleChoiceBoxed

# Repeated to the number of characters.
REPEATED = {
    "quads": "\\quad ",
    "thin spaces": "\\,",
    "tildes": "~",
    "blanks": " ",
    "newlines": "\n",
    "blank lines": " \n\t\n",
    "dollars": "$",
    "display dollars": "$$ ",
    "opening displays": "\\[ ",
    "opening inline": "\\( 1 ",
    "opening parentheses": "(",
    "closing brackets": "]",
    "opening braces": "{",
    "escaped braces": "\\{",
    "bars": "|",
    "minus signs": "-",
    "powers of x": "x^",
    "indices": "x_",
    "sums": "1+",
    "quotients": "1/",
    "products": "2 \\cdot ",
    "groups of digits": "123,",
    "spaced groups": "123 ",
    "decimals": "0.1 ",
    "dots": ".",
    "one digit": "7",
    "e-notations": "1e5",
    "equations": "x=1,",
    "relations": "1<",
    "letters": "a",
    "words": "so ",
    "answers": "answer is ",
    "answers without number": "The final answer ",
    "answer colons": "Answer: ",
    "choices": "Answer: A or ",
    "option letters": "A, ",
    "boxes": "\\boxed{1} ",
    "open boxes": "\\boxed{",
    "box blanks": "\\boxed   ",
    "fractions": "\\frac{1}{2}",
    "bare fractions": "\\frac",
    "backticks": "`",
    "fences": "```\n",
    "asterisks": "*",
    "highlights": "*a ",
    "angle brackets": "<",
    "thinking": "<think>",
    "closed thinking": "</think>",
    "hours": "2 hours ",
    "opening brackets": "[1,",
    "Chinese": "答案是",
    "sentences": "No. ",
}
# Expressions without bounds, in a box. The rest of the text precedes them.
EXPRESSIONS = {
    "tower of powers": "9^{9^{9^{9}}}",
    "high power": "7^{9999999999}",
    "factorial": "(10^9)!",
    "repeated factorial": "9!!!!",
    "nested sums": "\\sum_{i=1}^{9999}\\sum_{j=1}^{9999}\\sum_{k=1}^{9999} ijk",
    "large binomial": "\\binom{1000000}{500000}",
    "integral": "\\int_0^1\\int_0^1 \\frac{\\sin(x^y)}{e^{x^y}} dx dy",
    "high root": "\\sqrt[9999]{10^{99999}}",
    "sine of a power": "\\sin(10^{10^{10}})",
}
# Deep or long content of a box.
BOXED = {
    "boxed blanks": lambda size: "1" + " " * size + "x",
    "boxed newlines": lambda size: "1" + "\n" * size + "x",
    "boxed quads": lambda size: "1" + "\\quad" * (size // 5) + " x",
    "boxed braces": lambda size: "{" * (size // 2) + "1" + "}" * (size // 2),
    "boxed parentheses": lambda size: "(" * (size // 2) + "1" + ")" * (size // 2),
    "boxed roots": lambda size: "\\sqrt{" * (size // 7) + "2" + "}" * (size // 7),
    "boxed tower": lambda size: "2^{" * (size // 4) + "2" + "}" * (size // 4),
    "boxed list": lambda size: "1, " * (size // 3) + "2",
    "boxed digits": lambda size: "7" * size,
    "boxed text": lambda size: "\\text{" + "word " * (size // 5) + "}",
    "small parentheses": lambda size: " " * size + "((((((((1))))))))",
}


def forms(size: int) -> dict[str, str]:
    """Return the degenerate responses by name, each of about `size` characters."""
    repeated = {name: (text * (size // len(text) + 1))[:size] for name, text in REPEATED.items()}
    expressions = {name: "So " * (size // 3) + f"\\boxed{{{text}}}" for name, text in EXPRESSIONS.items()}
    return {**repeated, **expressions, **{name: f"\\boxed{{{make(size)}}}" for name, make in BOXED.items()}}


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["word"]},
    "keywords:frequency": {"keyword": "word", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["word"]},
    "keywords:letter_frequency": {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
    "language:response_language": {"language": "en"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 2, "relation": "at least"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "so"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say so"},
    "startend:end_checker": {"end_phrase": "so"},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
}


def scorers() -> dict[str, Callable[[str], object]]:
    """Return functions of the response by reward."""
    math, choice, exact = MathRule(timeout_s=60), MultipleChoiceBoxed(answer_phrase=True), ExactMatch()
    length = Length(max_length=100, repetition_ngram=3)
    named = {name: Format(name) for name in ("think_answer", "think", "boxed")}
    instructions = IfEval()
    row = {"instruction_id_list": list(INSTRUCTIONS), "kwargs": [_ARGUMENTS.get(name, {}) for name in INSTRUCTIONS]}
    prompt = JudgePrompt()
    return {
        "math_rule": lambda text: math("", text, "7"),
        "multiple_choice_boxed": lambda text: choice("", text, "B"),
        "exact_match": lambda text: exact("", text, "7"),
        "format": lambda text: [rule("", text, "") for rule in named.values()],
        "length": lambda text: length("", text, ""),
        "ifeval": lambda text: instructions("", text, "", **row),
        "code_sandbox": extract_program,
        "llm_judge": lambda text: prompt.render("", text, "7", {}),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--limit", type=float, default=0.2)
    arguments = parser.parse_args()
    rewards, rows = scorers(), {}
    for name, text in forms(arguments.characters).items():
        rows[name] = [_seconds(score, text) for score in rewards.values()]
    print(f"{'form':26}" + "".join(f"{reward[:12]:>13}" for reward in rewards))
    for name, times in sorted(rows.items(), key=lambda row: -max(row[1])):
        print(f"{name:26}" + "".join(f"{seconds:13.4f}" for seconds in times))
    slowest = max(max(times) for times in rows.values())
    print(f"{len(rows)} forms; slowest {slowest:.3f} s (limit {arguments.limit} s)")
    raise SystemExit(slowest > arguments.limit)


def _seconds(score: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    score(text)
    return time.process_time() - started


if __name__ == "__main__":
    main()
