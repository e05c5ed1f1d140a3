"""The generated task: right answers, slips that carry on, splits that do not touch."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.data.column_addition import MAX_ROWS, demonstrations, rows, work_out
from roll_gspo.errors import DataError

operands = st.integers(10, 999)


def replay(a: int, b: int, answer: str) -> tuple[int, int]:
    """(number of columns with a wrong sum, result), checking that the digits and carries are consistent."""
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


def test_answer_reads_as_documented():
    assert work_out(347, 86, random.Random(0)) == "7+6+0=13,4+8+1=13,3+0+1=4:433"


@given(operands, operands)
def test_clean_answer_is_the_sum(a, b):
    assert replay(a, b, work_out(a, b, random.Random(0))) == (0, a + b)


@given(operands, operands, st.integers(0, 10**6))
def test_certain_slips_change_every_column_and_are_carried_on(a, b, seed):
    answer = work_out(a, b, random.Random(seed), slip_probability=1.0)
    slips, _ = replay(a, b, answer)
    assert slips == max(len(str(a)), len(str(b)))


def test_slips_come_as_often_as_asked():
    columns = wrong = 0
    for prompt, answer in demonstrations(4000, seed=1, slip_probability=0.25):
        a, b = map(int, prompt.rstrip("=").split("+"))
        columns += answer.count("=")
        wrong += replay(a, b, answer)[0]
    assert wrong / columns == pytest.approx(0.25, abs=0.015)


def test_splits_share_no_pair_in_either_order_whatever_the_seed():
    def pairs(split, seed):
        return {frozenset(r.id.split("/")[-1].split("+")) for r in rows(8000, seed, split)}

    train, validation = pairs("train", 0) | pairs("train", 1), pairs("validation", 0) | pairs("validation", 1)
    shown = {frozenset(p.rstrip("=").split("+")) for p, _ in demonstrations(8000, 2, 0.25)}
    assert not (train | shown) & validation


def test_rows_are_distinct_right_and_the_same_for_the_same_seed():
    made = rows(500, 3, "train")
    assert made == rows(500, 3, "train") != rows(500, 4, "train")
    assert len({r.id for r in made}) == 500
    for row in made:
        a, b = map(int, row.messages[0]["content"].rstrip("=").split("+"))
        assert row.ground_truth == str(a + b) and {len(str(a)), len(str(b))} <= {2, 3}
    assert demonstrations(50, 3, 0.25) == demonstrations(50, 3, 0.25) != demonstrations(50, 4, 0.25)


@pytest.mark.parametrize("num_rows", [0, MAX_ROWS + 1])
def test_impossible_number_of_rows_is_refused(num_rows):
    with pytest.raises(DataError, match=f"num_rows is {num_rows}"):
        rows(num_rows, 0, "validation")


def test_the_smaller_split_holds_the_largest_number_of_rows():
    assert len(rows(MAX_ROWS, 0, "validation")) == MAX_ROWS
