"""Routing of data rows to reward domains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.config.environment_table import OTHERS
from roll_gspo.errors import ConfigError, DataError


class Router:
    """Maps each row to the domain whose reward scores it: by its `domain`, else by its `tag`.

    If only one domain is configured, it also scores rows that have neither.

    Args:
        tags: `tag_included` by domain, for each block of `rewards`.
        key: key of the blocks, for error messages.

    Raises:
        ConfigError: no domain is configured, or two domains include the same tag.
    """

    def __init__(self, tags: Mapping[str, Sequence[str]], key: str = "rewards") -> None:
        if not tags:
            raise ConfigError(f"{key}: no domain is configured; add at least one")
        self._key = key
        self._domains = tuple(tags)
        self._domain_of_tag: dict[str, str] = {}
        for domain, included in tags.items():
            for tag in included:
                owner = self._domain_of_tag.setdefault(tag, domain)
                if owner != domain:
                    raise ConfigError(
                        f"{key}.{domain}.tag_included: '{tag}' is also in {key}.{owner}.tag_included; "
                        "remove it from one of them"
                    )

    def domain_of(self, row: Mapping[str, Any]) -> str:
        """Return the domain whose reward scores the row.

        Raises:
            DataError: no domain matches.
        """
        domain = self._find(row)
        if domain is None:
            raise DataError(f"{self._key}: row '{row.get('id', '?')}': {self._unmatched(*_labels(row))}")
        return domain

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Check that every row has a reward.

        Raises:
            DataError: some rows have none; the message has one line per combination of domain and tag.
        """
        unmatched: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if self._find(row) is None:
                unmatched.setdefault(_labels(row), []).append(str(row.get("id", "?")))
        if unmatched:
            lines = (
                f"{self._key}: {len(ids)} rows (first: '{ids[0]}'): {self._unmatched(*labels)}"
                for labels, ids in unmatched.items()
            )
            raise DataError("\n".join(lines))

    def _find(self, row: Mapping[str, Any]) -> str | None:
        domain, tag = _labels(row)
        if domain in self._domains:
            return domain
        if tag in self._domain_of_tag:
            return self._domain_of_tag[tag]
        if OTHERS in self._domain_of_tag:
            return self._domain_of_tag[OTHERS]
        return self._domains[0] if not domain and not tag and len(self._domains) == 1 else None

    def _unmatched(self, domain: str, tag: str) -> str:
        tags = ", ".join(sorted(self._domain_of_tag)) or "none"
        return (
            f"domain '{domain}' and tag '{tag}' match no block (known domains: {', '.join(self._domains)}; "
            f"known tags: {tags}); add {self._key}.{domain or '<domain>'}, or add the tag to a tag_included"
        )


def _labels(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("domain") or "", row.get("tag") or ""
