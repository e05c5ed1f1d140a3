"""Keys of batches and lengths, flat at the top level of the YAML."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import NonNegativeInt, PositiveInt

from roll_gspo.config.base import Problem, Schema


class BatchConfig(Schema):
    """How much is generated a step, how long it may be, and how many steps there are."""

    rollout_batch_size: PositiveInt
    """Prompts a step."""
    num_return_sequences_in_group: PositiveInt = 1
    """Samples a prompt: the group."""
    prompt_length: PositiveInt = 1024
    """Longest prompt in tokens; longer ones are dropped and counted, never cut."""
    response_length: PositiveInt | None = None
    """Longest response in tokens."""
    sequence_length: PositiveInt | None = None
    """prompt_length + response_length; give this or `response_length`."""
    max_steps: PositiveInt = 500
    """Rollouts of the whole run."""
    trace_groups: NonNegativeInt = 1
    """Groups a step that are scored again after the update, so that the report shows each token's ratio; 0: none."""
    val_prompt_length: PositiveInt | None = None
    """Longest prompt in validation, in tokens; null: `prompt_length`."""
    val_sequence_length: PositiveInt | None = None
    """Longest prompt plus longest response in validation; null: as much room for the response as in training, or
    `validation.generating_args.max_new_tokens`."""

    @property
    def max_response_length(self) -> int:
        """Longest response in tokens, whichever key gave it."""
        if self.response_length is not None:
            return self.response_length
        assert self.sequence_length is not None  # held by the rule below
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
        """Exactly one length decides, and leaves room."""
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
