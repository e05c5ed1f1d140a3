"""The block of an agent: the user's own program plays the episodes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema

_OWN = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ROLL_GSPO_ROW", "ROLL_GSPO_SEED", "TMPDIR")


class AgentConfig(Schema):
    """A program that calls the model like a model of OpenAI. The run starts it once per episode."""

    command: str
    """The program and its arguments, e.g. `python my_agent.py`. It is split like the line of a shell, but no shell runs
    it; `python` is the interpreter of the run. The program finds the endpoint in `OPENAI_BASE_URL` and its key in
    `OPENAI_API_KEY`. `ROLL_GSPO_ROW` is the path of a JSON file with the data row, `ROLL_GSPO_SEED` the row's seed."""
    max_requests: PositiveInt = 32
    """Largest number of answers of the model per episode. Further requests get an error with the code
    `max_requests`."""
    max_tokens_per_request: PositiveInt | None = None
    """Largest number of tokens per answer; null: what is left of `response_length`, which limits a conversation."""
    timeout_s: PositiveFloat = 600.0
    """Time limit in seconds per episode, generation included. After it, the program is killed and the episode has
    failed."""
    max_concurrent: PositiveInt = 32
    """Programs that run at the same time; further ones wait. Each is a process with its own interpreter, so it needs
    main memory, and about a second of a core if it imports `openai`."""
    max_memory_mb: PositiveInt | None = None
    """Memory limit of each process of the program in MiB; null: no limit. If the machine runs out of memory, the kernel
    kills a program before the training process."""
    tool_call_parser: Literal["hermes", "llama3", "mistral"] | None = "hermes"
    """Format in which the model writes calls of the `tools` of a request: `hermes` (Qwen), `llama3` or `mistral`. null:
    calls remain in the text."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the program. It receives no others but those of `forward_env` and what every program
    needs, such as `PATH`, `HOME` and `PYTHONPATH`."""
    forward_env: Names = ()
    """Names of environment variables of the run that the program receives, e.g. the token of a service."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The program and its arguments."""
        return tuple(shlex.split(self.command))

    def broken_rules(self) -> Iterator[Problem]:
        """Yield a command that cannot be split, and variables that the run sets itself."""
        yield from super().broken_rules()
        try:
            arguments = self.arguments
        except ValueError as error:
            yield Problem("command", f"{self.command!r} cannot be split ({error}); close the quotes")
        else:
            if not arguments:
                yield Problem("command", "is empty; name a program, e.g. python my_agent.py")
        for name in _OWN:
            if name in self.env:
                yield Problem(f"env.{name}", "the run sets this variable itself; remove it")
            if name in self.forward_env:
                yield Problem("forward_env", f"the run sets {name} itself; remove it")
