"""`builtin:column_addition`: correct answers, slips, and disjoint splits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.data.column_addition import MAX_ROWS, demonstrations, rows, worked_answer
from roll_gspo.errors import DataError

operands = st.integers(10, 999)


def replay(a: int, b: int, answer: str) -> tuple[int, int]:
    """Check digits and carries of an answer, and return (number of columns with a wrong sum, result)."""
    working, _, result = answer.partition(":")
    slips, carry, value = 0, 0, 0
    for place, column in enumerate(working.split(",")):
        terms, _, total = column.partition("=")
        assert terms == f"{a // 10**place % 10}+{b // 10**place % 10}+{carry}"
        slips += sum(int(term) for term in terms.split("+")) != int(total)
        carry, digit = divmod(int(total), 10)
        value += digit * 10**place
    assert int(result) == value + carry * 10 ** (place + 1)
    return slips, int(result)


def test_answer_has_the_documented_format():
    assert worked_answer(347, 86, random.Random(0)) == "7+6+0=13,4+8+1=13,3+0+1=4:433"


@given(operands, operands)
def test_answer_without_slips_is_the_sum(a, b):
    assert replay(a, b, worked_answer(a, b, random.Random(0))) == (0, a + b)


@given(operands, operands, st.integers(0, 10**6))
def test_slip_probability_1_changes_every_column_consistently(a, b, seed):
    answer = worked_answer(a, b, random.Random(seed), slip_probability=1.0)
    slips, _ = replay(a, b, answer)
    assert slips == max(len(str(a)), len(str(b)))


def test_slip_rate_equals_slip_probability():
    columns = wrong = 0
    for prompt, answer in demonstrations(4000, seed=1, slip_probability=0.25):
        a, b = map(int, prompt.rstrip("=").split("+"))
        columns += answer.count("=")
        wrong += replay(a, b, answer)[0]
    assert wrong / columns == pytest.approx(0.25, abs=0.015)


def test_splits_share_no_operands_in_either_order_for_any_seed():
    def pairs(split, seed):
        return {frozenset(r.id.split("/")[-1].split("+")) for r in rows(8000, seed, split)}

    train, validation = pairs("train", 0) | pairs("train", 1), pairs("validation", 0) | pairs("validation", 1)
    demonstrated = {frozenset(p.rstrip("=").split("+")) for p, _ in demonstrations(8000, 2, 0.25)}
    assert not (train | demonstrated) & validation


def test_rows_are_distinct_correct_and_reproducible():
    generated = rows(500, 3, "train")
    assert generated == rows(500, 3, "train") != rows(500, 4, "train")
    assert len({r.id for r in generated}) == 500
    for row in generated:
        a, b = map(int, row.messages[0]["content"].rstrip("=").split("+"))
        assert row.ground_truth == str(a + b) and {len(str(a)), len(str(b))} <= {2, 3}
    assert demonstrations(50, 3, 0.25) == demonstrations(50, 3, 0.25) != demonstrations(50, 4, 0.25)


@pytest.mark.parametrize("num_rows", [0, MAX_ROWS + 1])
def test_num_rows_out_of_range_raises(num_rows):
    with pytest.raises(DataError, match=f"num_rows is {num_rows}"):
        rows(num_rows, 0, "validation")


def test_smaller_split_has_max_rows():
    assert len(rows(MAX_ROWS, 0, "validation")) == MAX_ROWS
