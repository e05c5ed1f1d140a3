from __future__ import annotations

import pytest

from roll_gspo.strategies.base import OptimizerSetup
from roll_gspo.strategies.schedule import learning_rate


def _rates(kind: str, warmup: int = 4) -> list[float]:
    setup = OptimizerSetup(1.0, 12, 1.0, kind, warmup, min_learning_rate=0.2)  # type: ignore[arg-type]
    return [learning_rate(setup, step) for step in range(15)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_is_linear_and_wastes_no_step(kind: str) -> None:
    assert _rates(kind)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_decay_ends_at_the_minimum_and_stays_there() -> None:
    assert _rates("constant")[4:] == [1.0] * 11
    assert _rates("linear")[8] == pytest.approx(0.6) and _rates("linear")[12:] == pytest.approx([0.2] * 3)
    assert _rates("cosine")[8] == pytest.approx(0.6) and _rates("cosine")[12:] == pytest.approx([0.2] * 3)
    assert _rates("cosine")[6] > _rates("linear")[6]


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert _rates("cosine", warmup=0)[0] == 1.0
