"""The agent of a run: the endpoint, and the programs that play the episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from roll_gspo.config.environment_table import AGENT, OTHERS
from roll_gspo.data.templates import ChatFormat
from roll_gspo.roles.agents.client import AgentClient, AgentLimits
from roll_gspo.roles.agents.program import AgentCommand
from roll_gspo.roles.agents.server import AgentServer
from roll_gspo.roles.episode_manager import EpisodeManager
from roll_gspo.roles.generator import Generator
from roll_gspo.strategies.base import Sampling
from roll_gspo.tools.calls import CallFormat

_WAIT_BEYOND_EPISODE_S = 600.0  # pauses of the engines do not count for the time limit of an episode


@dataclass(frozen=True)
class AgentSettings:
    """Settings of the agent.

    Attributes:
        command: the program.
        limits: limits of an episode in training.
        validation_limits: limits of an episode in validation.
        call_format: format of the calls of tools; None leaves them in the text.
    """

    command: AgentCommand
    limits: AgentLimits
    validation_limits: AgentLimits
    call_format: CallFormat | None = None


class AgentManager(EpisodeManager):
    """Owns the endpoint. The program of an episode gives its reward.

    Args:
        settings: settings of the agent.
        format_penalty: added to the reward of every answer whose calls cannot be read.
        validation_format_penalty: the same in validation.
    """

    def __init__(
        self, settings: AgentSettings, format_penalty: float = 0.0, validation_format_penalty: float = 0.0
    ) -> None:
        super().__init__({AGENT: (OTHERS,)}, AGENT)
        self._settings = settings
        self._penalty = format_penalty
        self._validation_penalty = validation_format_penalty
        self._server: AgentServer | None = None

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Check that the program exists.

        Raises:
            ConfigError: it does not.
        """
        self._settings.command.check()

    def play(
        self, generator: Generator, tokenizer: Any, chat: ChatFormat, sampling: Sampling, *, validation: bool
    ) -> AgentClient:
        """Return a client that plays episodes with programs. The first one starts the endpoint."""
        settings = self._settings
        if self._server is None:
            self._server = AgentServer(settings.limits.timeout_s + _WAIT_BEYOND_EPISODE_S)
        return AgentClient(
            *(generator.open_stream(validation), self._server, settings.command, tokenizer),
            template=chat.templates()[chat.template],
            sampling=sampling,
            limits=settings.validation_limits if validation else settings.limits,
            call_format=settings.call_format,
            format_penalty=self._validation_penalty if validation else self._penalty,
        )

    def close(self) -> None:
        """Stop the endpoint. Its clients have ended the programs."""
        if self._server is not None:
            self._server.close()
