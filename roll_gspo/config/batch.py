"""Top-level keys of batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt

from roll_gspo.config.base import Problem, Schema


class LogRolloutsConfig(Schema):
    """The files of samples."""

    samples: NonNegativeInt | None = 256
    """Samples per file with texts; null: all. Scores, token ids and values per token are written for every sample."""


def _log_rollouts(value: Any) -> Any:
    if isinstance(value, bool):
        return {} if value else None
    return {"samples": value} if isinstance(value, int) else value


class BatchConfig(Schema):
    """Batch sizes, lengths and number of steps."""

    rollout_batch_size: PositiveInt
    """Prompts per step."""
    num_return_sequences_in_group: PositiveInt = 1
    """Samples per prompt (group size)."""
    prompt_length: PositiveInt = 1024
    """Longest prompt in tokens; longer ones are dropped and counted, never truncated."""
    response_length: PositiveInt | None = None
    """Longest response in tokens."""
    sequence_length: PositiveInt | None = None
    """`prompt_length` + `response_length`; set this or `response_length`."""
    max_steps: PositiveInt = 500
    """Rollouts of the whole run."""
    max_failed_reward_steps: PositiveInt | None = 3
    """Stop after this many consecutive steps in which every reward failed; null: never."""
    trace_groups: NonNegativeInt = 1
    """Groups per step to score again after the update, for the ratio of each token in the report."""
    log_rollouts: Annotated[LogRolloutsConfig | None, BeforeValidator(_log_rollouts)] = LogRolloutsConfig()
    """Write the samples of every step and validation to `rollouts/` and `validation/`. `false`: no files. A number sets
    `samples`."""
    log_samples_every: NonNegativeInt = 10
    """Steps between the tables of a few rollouts in trackers; 0: no tables."""
    val_prompt_length: PositiveInt | None = None
    """Longest prompt in validation, in tokens; null: `prompt_length`."""
    val_sequence_length: PositiveInt | None = None
    """Longest prompt plus response in validation, in tokens; null: the response may have as many tokens as in training,
    or `validation.generating_args.max_new_tokens`."""

    @property
    def max_response_length(self) -> int:
        """Longest response in tokens, from `response_length` or `sequence_length`."""
        if self.response_length is not None:
            return self.response_length
        assert self.sequence_length is not None  # guaranteed by the rule below
        return self.sequence_length - self.prompt_length

    @property
    def max_sequence_length(self) -> int:
        """Longest prompt plus longest response in tokens."""
        return self.prompt_length + self.max_response_length

    @property
    def validation_prompt_length(self) -> int:
        """Longest prompt in validation, in tokens."""
        return self.val_prompt_length or self.prompt_length

    @property
    def samples_per_rollout(self) -> int:
        """Prompts times group size."""
        return self.rollout_batch_size * self.num_return_sequences_in_group

    def broken_rules(self) -> Iterator[Problem]:
        """Yield missing, contradictory and too small lengths."""
        yield from super().broken_rules()
        total, response = self.sequence_length, self.response_length
        if total is None and response is None:
            yield Problem("response_length", "missing; add it, or sequence_length", ("sequence_length",))
        if total is not None and response is not None and total != self.prompt_length + response:
            yield Problem(
                "sequence_length",
                f"{total} is not prompt_length {self.prompt_length} + response_length {response}; remove one of the "
                "three",
                ("prompt_length", "response_length"),
            )
        elif total is not None and total <= self.prompt_length:
            message = f"{total} leaves no room after prompt_length {self.prompt_length}; raise it"
            yield Problem("sequence_length", message, ("prompt_length",))
        if self.val_sequence_length is not None and self.val_sequence_length <= self.validation_prompt_length:
            key = "val_prompt_length" if self.val_prompt_length else "prompt_length"
            yield Problem(
                "val_sequence_length",
                f"{self.val_sequence_length} leaves no room after {key} {self.validation_prompt_length}; raise it",
                (key,),
            )
