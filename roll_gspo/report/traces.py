"""Links to the profiler's traces."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def traces_section(names: Sequence[str]) -> str:
    """Return links to the files of `profile/` in the run's folder; empty if there are none."""
    if not names:
        return ""
    links = "".join(f'<li><a href="profile/{escape(name)}">{escape(name)}</a></li>' for name in names)
    return (
        f"<details><summary>{len(names)} traces</summary><p>Open a trace in https://ui.perfetto.dev or "
        f"chrome://tracing.</p><ul>{links}</ul></details>"
    )
