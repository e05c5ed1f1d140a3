"""The block `validation`: held-out prompts and their metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema
from roll_gspo.config.data import DataArgs
from roll_gspo.config.roles import GeneratingArgs


def _distinct(value: Any) -> Any:
    """Convert a list without duplicates to a tuple; pydantic reports other values."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(map(repr, value))) < len(value):
        raise ValueError(f"expected each k once, got {list(value)}")
    return tuple(value)


class ValidationConfig(Schema):
    """Held-out prompts, scored before the first step, every `eval_steps` and after the last step."""

    data_args: DataArgs
    """Validation prompts."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling of validation responses, with `num_return_sequences` samples per prompt."""
    group_by: Literal["source", "domain", "tag"] = "source"
    """Column by which metrics are grouped, in addition to those over all prompts. The source of a row defaults to its
    file name (to its domain, if `data_args` sets one), and to the tag of a generated row."""
    sources: Names = ()
    """Use only rows with these values of `group_by`; empty: all."""
    metrics_k: Annotated[tuple[PositiveInt, ...], BeforeValidator(_distinct)] | None = None
    """Values of k for `pass@k` and `maj@k`, up to `num_return_sequences`; null: `num_return_sequences` if above 1,
    else none."""
    correct_score: float = 1.0
    """Minimum score of a correct sample for `pass@k`."""
    batch_size: PositiveInt | None = None
    """Prompts per generation call; null: all. It does not change the samples."""

    @property
    def num_samples(self) -> int:
        """Samples per prompt."""
        return self.generating_args.num_return_sequences or 1

    @property
    def attempts(self) -> tuple[int, ...]:
        """Values of k for `pass@k` and `maj@k`, ascending."""
        if self.metrics_k is None:
            return (self.num_samples,) if self.num_samples > 1 else ()
        return tuple(sorted(self.metrics_k))

    def broken_rules(self) -> Iterator[Problem]:
        """Yield training-only keys, too few samples for `metrics_k`, and several greedy samples."""
        yield from super().broken_rules()
        if self.data_args.domain_interleave_probs is not None:
            message = "is used only in training: validation takes every row; remove it"
            yield Problem("data_args.domain_interleave_probs", message)
        samples = self.num_samples
        if self.attempts and self.attempts[-1] > samples:
            yield Problem(
                "metrics_k",
                f"pass@{self.attempts[-1]} needs as many samples per prompt, but generating_args.num_return_sequences "
                f"is {samples}; lower the first, or raise the second",
                ("generating_args.num_return_sequences",),
            )
        if self.generating_args.temperature == 0 and samples > 1:
            yield Problem(
                "generating_args.temperature",
                f"0 is greedy, so all {samples} samples of a prompt are equal; set "
                "generating_args.num_return_sequences: 1, or a temperature above 0",
                ("generating_args.num_return_sequences",),
            )
