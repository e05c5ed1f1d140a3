"""Summary of failed samples for the log."""

from __future__ import annotations

from roll_gspo.rewards.base import RewardRequest, RewardResult

_MAX_LISTED = 7  # besides the first one
_MAX_REASONS = 1000  # reasons beyond this number are counted, but not listed


class FailureSummary:
    """Counts scored samples and the reasons of failures until `take_text`. Its size is bounded.

    Args:
        key: key path of the reward's block.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._reset()

    def add(self, number: int, request: RewardRequest, result: RewardResult) -> None:
        """Count a sample.

        Args:
            number: position of the sample. The failure with the lowest position is named first.
            request: the sample.
            result: its result.
        """
        self._num_scored += 1
        if result.failed is None:
            return
        self._num_failed += 1
        if self._first is None or number < self._first[0]:
            self._first = number, str(request.row.get("id", "?")), result.failed
        if result.failed in self._reasons or len(self._reasons) < _MAX_REASONS:
            count, first = self._reasons.get(result.failed, (0, number))
            self._reasons[result.failed] = count + 1, min(first, number)

    def take_text(self) -> str | None:
        """Return the line to log, or None if no sample failed, and reset the counts."""
        if self._first is None:
            self._reset()
            return None
        _, row, reason = self._first
        others = sorted((-count, first, text) for text, (count, first) in self._reasons.items() if text != reason)
        listed = "".join(f"; {-count} times: {text}" for count, _, text in others[:_MAX_LISTED])
        text = f"{self._key}: {self._num_failed} of {self._num_scored} samples failed, first (row {row}): {reason}"
        self._reset()
        return text + listed

    def _reset(self) -> None:
        self._num_scored = self._num_failed = 0
        self._first: tuple[int, str, str] | None = None
        self._reasons: dict[str, tuple[int, int]] = {}
