from __future__ import annotations

import re
from pathlib import Path

from roll_gspo.tracking.names import METRIC_PATTERNS, METRICS, metrics_page

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_metrics_page_is_current() -> None:
    assert PAGE.read_text() == metrics_page(), "run: python -m roll_gspo.tracking.names > docs/metrics.md"


def test_metrics_names_are_family_and_quantity() -> None:
    for name in METRICS:
        assert re.fullmatch(r"[a-z]+/[a-z_0-9]+", name), name
    for name in METRIC_PATTERNS:
        assert re.fullmatch(r"[a-z]+(/([a-z_]+@)?([a-z_]+|([a-z_]+_)?<[a-z]+>(_[a-z]+)?))+", name), name
    for name, info in (METRICS | METRIC_PATTERNS).items():
        assert info.meaning.endswith("."), name
        assert info.unit and info.reduction, name
