"""Demonstrations of sums that are calculated with a tool."""

from __future__ import annotations

import random

from roll_gspo.environments.calculated_sums import calculated_sum, demonstrations
from roll_gspo.tools.calculator import calculate
from roll_gspo.tools.calls import Call, parse_mistral


def test_demonstration_calls_the_calculator() -> None:
    assert calculated_sum(347, 86, random.Random(0)) == [
        {"role": "user", "content": "347+86="},
        {"role": "assistant", "content": '[TOOL_CALLS]calc{"expression":"347+86"}'},
        {"role": "tool", "content": "433"},
        {"role": "assistant", "content": "433"},
    ]


def test_slips_are_guesses_and_results_are_those_of_the_tool() -> None:
    shown = demonstrations(400, seed=1, slip_probability=0.4)
    guesses = [messages for messages in shown if len(messages) == 2]
    assert 0.34 < len(guesses) / len(shown) < 0.46
    for messages in shown:
        a, b = map(int, messages[0]["content"][:-1].split("+"))
        assert (messages[-1]["content"] == str(a + b)) == (messages not in guesses)
        if messages not in guesses:
            (call,) = parse_mistral(messages[1]["content"])
            assert isinstance(call, Call) and call.name == "calc"
            assert calculate(call.arguments["expression"]) == messages[2]["content"]
    assert shown == demonstrations(400, seed=1, slip_probability=0.4)
