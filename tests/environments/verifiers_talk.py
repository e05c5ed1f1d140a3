"""A taskset of verifiers whose environment answers the model as a user, in several turns."""

from __future__ import annotations

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["Guesses", "Talk"]


class GuessTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def found(self, trace: vf.Trace) -> float:
        return 1.0 / trace.num_turns if trace.last_reply.strip() == "7" else 0.0


class Guesses(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterable[GuessTask]:
        while True:
            yield GuessTask(vf.TaskData(prompt="Guess a number."), self.config.task)


class Talk(vf.SingleAgentEnv):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        async with agents.agent.interaction(task) as talk:
            guess = await talk.turn()
            while not guess.terminated and guess.last_reply.strip() != "7":
                guess = await talk.turn("more" if int(guess.last_reply) < 7 else "less")
