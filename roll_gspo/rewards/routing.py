"""Which reward scores which row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.errors import ConfigError, DataError


class Router:
    """Rows to domains: the row's `domain` decides, else its `tag`.

    A row with neither goes to the only domain where there is just one.

    Args:
        tags: `tag_included` of each domain, i.e. of each entry of `rewards:`.

    Raises:
        ConfigError: there is no domain, or two of them claim a tag.
    """

    def __init__(self, tags: Mapping[str, Sequence[str]]) -> None:
        if not tags:
            raise ConfigError("rewards: none is configured; name at least one domain with its worker_cls")
        self._domains = tuple(tags)
        self._domain_of_tag: dict[str, str] = {}
        for domain, included in tags.items():
            for tag in included:
                owner = self._domain_of_tag.setdefault(tag, domain)
                if owner != domain:
                    raise ConfigError(
                        f"rewards.{domain}.tag_included: '{tag}' is already in rewards.{owner}.tag_included; "
                        "leave it in one of them"
                    )

    def domain_of(self, row: Mapping[str, Any]) -> str:
        """The domain whose reward scores the row.

        Raises:
            DataError: there is none.
        """
        domain = self._find(row)
        if domain is None:
            raise DataError(f"rewards: row '{row.get('id', '?')}' {self._unmatched(*_labels(row))}")
        return domain

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """See that every row of the data has a reward, before training starts.

        Raises:
            DataError: one line for each combination of domain and tag that has none.
        """
        unmatched: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if self._find(row) is None:
                unmatched.setdefault(_labels(row), []).append(str(row.get("id", "?")))
        if unmatched:
            lines = (
                f"rewards: {len(ids)} rows, the first '{ids[0]}', {self._unmatched(*labels)}"
                for labels, ids in unmatched.items()
            )
            raise DataError("\n".join(lines))

    def _find(self, row: Mapping[str, Any]) -> str | None:
        domain, tag = _labels(row)
        if domain in self._domains:
            return domain
        if tag in self._domain_of_tag:
            return self._domain_of_tag[tag]
        return self._domains[0] if not domain and not tag and len(self._domains) == 1 else None

    def _unmatched(self, domain: str, tag: str) -> str:
        tags = ", ".join(sorted(self._domain_of_tag)) or "none"
        return (
            f"of domain '{domain}' and tag '{tag}' matches no reward (known domains: {', '.join(self._domains)}; "
            f"known tags: {tags}); add rewards.{domain or '<domain>'}, or put the tag into a tag_included"
        )


def _labels(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("domain") or "", row.get("tag") or ""
