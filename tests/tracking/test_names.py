from __future__ import annotations

import re
from pathlib import Path

from roll_gspo.tracking.names import METRICS, metrics_page

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_metrics_page_is_current() -> None:
    assert PAGE.read_text() == metrics_page(), "run: python -m roll_gspo.tracking.names > docs/metrics.md"


def test_metrics_names_are_family_and_quantity() -> None:
    for name, info in METRICS.items():
        assert re.fullmatch(r"[a-z]+/[a-z_]+", name), name
        assert info.meaning.endswith("."), name
        assert info.unit and info.reduction, name
