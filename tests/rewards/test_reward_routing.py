"""Routing of rows to reward domains."""

from __future__ import annotations

import pytest

from roll_gspo.errors import ConfigError, DataError
from roll_gspo.rewards import Router

ROUTER = Router({"math": ("aime", "gsm8k"), "sums": ()})


@pytest.mark.parametrize(
    ("row", "domain"),
    [
        ({"domain": "sums", "tag": "aime"}, "sums"),
        ({"domain": "", "tag": "gsm8k"}, "math"),
        ({"domain": "elsewhere", "tag": "aime"}, "math"),
        ({"domain": "math"}, "math"),
    ],
)
def test_row_is_routed_by_domain_or_else_by_tag(row, domain):
    assert ROUTER.domain_of(row) == domain


def test_row_without_labels_goes_to_the_only_domain():
    assert Router({"sums": ()}).domain_of({"domain": "", "tag": ""}) == "sums"
    with pytest.raises(DataError):
        ROUTER.domain_of({"domain": "", "tag": ""})
    with pytest.raises(DataError):
        Router({"sums": ()}).domain_of({"domain": "math"})


def test_check_lists_unmatched_and_known_labels():
    rows = [{"id": str(i), "domain": d, "tag": "t"} for i, d in enumerate(["math", "code", "code", "law"])]
    with pytest.raises(DataError) as caught:
        ROUTER.check(rows)
    code, law = str(caught.value).splitlines()
    assert "2 rows" in code and "'1'" in code and "domain 'code' and tag 't'" in code
    assert "1 rows" in law and "'3'" in law
    assert "known domains: math, sums; known tags: aime, gsm8k" in code
    ROUTER.check(rows[:1])


def test_duplicate_tag_and_missing_domains_raise():
    with pytest.raises(ConfigError, match=r"^rewards\.b\.tag_included: 't' .*rewards\.a"):
        Router({"a": ("t",), "b": ("t",)})
    with pytest.raises(ConfigError, match=r"^rewards: no domain"):
        Router({})
