"""The few rollouts of a step that trackers show as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

from roll_gspo.printable import printable
from roll_gspo.tracking.rollouts import RolloutRecord

SAMPLES_PER_STEP = 4


@dataclass(frozen=True)
class Sample:
    """One rollout. Its texts are printable: some trackers refuse or drop a table with a lone surrogate.

    Attributes:
        score: of the reward workers, before any normalization.
        advantage: mean over the tokens of the response.
        num_tokens: length of the response.
        finish_reason: `stop` or `length`.
        domain: the reward domain.
        ground_truth: what the reward compared with, if anything.
        answer: the final answer as the reward read it, or None.
        prompt: text of the prompt.
        response: text of the response, special tokens included.
    """

    score: float
    advantage: float
    num_tokens: int
    finish_reason: str
    domain: str | None
    ground_truth: str | None
    answer: str | None
    prompt: str
    response: str

    @property
    def values(self) -> tuple[Any, ...]:
        """Values in the order of `SAMPLE_COLUMNS`."""
        return astuple(self)

    @property
    def text(self) -> str:
        """The sample as lines of text."""
        head = f"score {self.score:g}  advantage {self.advantage:.4g}  {self.num_tokens} tokens  {self.finish_reason}"
        more = {"domain": self.domain, "ground truth": self.ground_truth, "answer": self.answer}
        lines = [head, *(f"{name}: {value}" for name, value in more.items() if value is not None)]
        return "\n".join([*lines, f"prompt: {self.prompt}", f"response: {self.response}"])


SAMPLE_COLUMNS = tuple(field.name for field in fields(Sample))


class SampleTable:
    """Collect the samples of a step while their records are written, then choose a few."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def collect(self, records: Iterable[RolloutRecord]) -> Iterator[RolloutRecord]:
        """Yield every record unchanged. Records whose reward failed are not collected."""
        for record in records:
            if not record.failed:
                self._samples.append(_sample(record))
            yield record

    def spread(self, count: int = SAMPLES_PER_STEP) -> list[Sample]:
        """Return at most `count` samples, evenly spaced from the lowest score to the highest."""
        ordered = sorted(self._samples, key=lambda sample: sample.score)
        if len(ordered) <= count:
            return ordered
        return [ordered[i * (len(ordered) - 1) // (count - 1)] for i in range(count)]


def _sample(record: RolloutRecord) -> Sample:
    return Sample(
        score=record.score,
        advantage=record.advantage,
        num_tokens=len(record.response_token_ids),
        finish_reason=record.finish_reason,
        domain=_printable(record.domain),
        ground_truth=_printable(record.ground_truth),
        answer=_printable(record.answer),
        prompt=printable(record.prompt),
        response=printable(record.response),
    )


def _printable(text: str | None) -> str | None:
    return None if text is None else printable(text)
