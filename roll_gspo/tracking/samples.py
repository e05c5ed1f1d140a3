"""The few rollouts of a step that trackers show as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

from roll_gspo.printable import printable

SAMPLES_PER_STEP = 4


@dataclass(frozen=True)
class Sample:
    """One rollout. Its texts are printable: some trackers refuse or drop a table with a lone surrogate.

    Attributes:
        score: of the reward workers, before any normalization.
        advantage: mean over the tokens of the response.
        num_tokens: number of sampled tokens.
        finish_reason: `stop` or `length`, or why an episode ended, e.g. `done`.
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

    def __post_init__(self) -> None:
        for name in ("domain", "ground_truth", "answer", "prompt", "response"):
            text = self.__dict__[name]
            object.__setattr__(self, name, None if text is None else printable(text))

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


def spread(scores: Mapping[int, float], count: int = SAMPLES_PER_STEP) -> list[int]:
    """Return at most `count` keys of `scores`, evenly spaced from the lowest score to the highest."""
    ordered = sorted(scores, key=lambda key: scores[key])
    if len(ordered) <= count:
        return ordered
    return [ordered[i * (len(ordered) - 1) // (count - 1)] for i in range(count)]
