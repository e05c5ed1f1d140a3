"""The interface of an environment. One object plays one episode."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """The first prompt of an episode.

    Attributes:
        messages: the conversation so far ({role, content}); the last message is not from the assistant.
        tools: schemas of the functions that the model may call, for the chat template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Reply:
    """The answer of an environment to one turn of the model.

    Attributes:
        messages: what the model sees next, at least one message unless the episode is done.
        reward: reward of the turn. The reward of an episode is the sum over its turns.
        done: True if the episode has ended.
        metrics: finite numbers to log, as means over the turns that report them.
        invalid: True if the model's turn could not be understood, e.g. a malformed call of a tool.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    invalid: bool = False


class Environment(ABC):
    """One episode. The environment is built in a worker process, with the arguments of its block.

    An exception marks the episode as failed. It is logged and excluded from training, and never counts as reward 0.
    """

    @classmethod
    def factory(cls, **arguments: Any) -> Callable[[], Environment]:
        """Return a function that builds the environment of one episode.

        It is called once per worker process, when the process starts. It builds one environment, so that wrong
        arguments stop the run before the first episode. Override it to build what all episodes of a process share, e.g.
        an index. The arguments of the block are then those of your method.
        """
        cls(**arguments).close()
        return functools.partial(cls, **arguments)

    @abstractmethod
    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        """Begin the episode of a data row.

        Args:
            row: columns of the row. All episodes of a group have the same row.
            seed: seed of the row, the same for all episodes of a group.
        """

    @abstractmethod
    def step(self, answer: str) -> Reply:
        """Take one turn of the model.

        Args:
            answer: the sampled text, without the token that ends the turn.
        """

    def close(self) -> None:  # noqa: B027, most environments hold no resources
        """Release resources. Called once after the last step, also of an episode that was cut off."""
