"""The block `validation`: held-out prompts, and the figures that are taken of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema
from roll_gspo.config.data import DataArgs
from roll_gspo.config.roles import GeneratingArgs


def _distinct(value: Any) -> Any:
    """A list of whole numbers, none of them twice, as a tuple; pydantic words what is wrong with anything else."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(map(repr, value))) < len(value):
        raise ValueError(f"expected each k once, got {list(value)}")
    return tuple(value)


class ValidationConfig(Schema):
    """Held-out prompts, scored before the first step, every `eval_steps`, and after the last."""

    data_args: DataArgs
    """Validation prompts."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling of validation responses; `num_return_sequences` samples a prompt."""
    group_by: Literal["source", "domain", "tag"] = "source"
    """Column whose values get figures of their own, beside those over all prompts; a row without a source goes by
    the name of its file (by its domain, if it has that from `data_args`), a generated one by its tag."""
    sources: Names = ()
    """Take only the rows with these values of `group_by`; empty: all."""
    metrics_k: Annotated[tuple[PositiveInt, ...], BeforeValidator(_distinct)] | None = None
    """Attempts k of `pass@k` and `maj@k`, each up to `num_return_sequences`; null: `num_return_sequences` where it is
    above 1, else none."""
    correct_score: float = 1.0
    """Score from which a sample counts as correct for `pass@k`."""
    batch_size: PositiveInt | None = None
    """Prompts that are generated and scored at once; null: all. It changes no sample."""

    @property
    def num_samples(self) -> int:
        """Samples a prompt."""
        return self.generating_args.num_return_sequences or 1

    @property
    def attempts(self) -> tuple[int, ...]:
        """The k of `pass@k` and `maj@k`, smallest first."""
        if self.metrics_k is None:
            return (self.num_samples,) if self.num_samples > 1 else ()
        return tuple(sorted(self.metrics_k))

    def broken_rules(self) -> Iterator[Problem]:
        """There are as many samples as the figures ask for, and they differ."""
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
