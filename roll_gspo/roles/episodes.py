"""Episodes of several turns: each turn is a request to the generation engines and a step of an environment."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from roll_gspo.batch import Completion
from roll_gspo.data.messages import Message
from roll_gspo.data.prompts import encode_chat
from roll_gspo.data.rendering import Tools, response_text
from roll_gspo.data.templates import ChatFormat
from roll_gspo.data.turns import TokenRecord, TurnRenderer
from roll_gspo.environments.base import Reply, Start
from roll_gspo.environments.pool import EnvironmentPool, EnvironmentTime, Failure, Played
from roll_gspo.episode import Episode, EpisodeTurn
from roll_gspo.roles.request_stream import StreamClient
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling

_SLICE_S = 0.05
DONE, TURN_LIMIT, TOKEN_LIMIT, TIME_LIMIT, FAILED = "done", "max_turns", "max_tokens", "timeout", "failed"


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of an episode.

    Attributes:
        max_turns: number of answers of the model.
        max_prompt_tokens: tokens of the first prompt. An episode with a longer one has failed.
        max_tokens: tokens after the first prompt, sampled and given.
        max_turn_tokens: tokens per answer.
        timeout_s: seconds from the start of the environment.
    """

    max_turns: int
    max_prompt_tokens: int
    max_tokens: int
    max_turn_tokens: int
    timeout_s: float


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to play.

    Attributes:
        key: number of the episode, unique among the outstanding ones of a client.
        prompt: tokens of the row. The environment's first prompt replaces them, unless it fails to begin.
        environment: name of the environment's block.
        row: columns of the data row.
        row_seed: seed of the environment, the same for all episodes of a group.
        seed: seed of the sampling.
    """

    key: int
    prompt: tuple[int, ...]
    environment: str
    row: Mapping[str, Any]
    row_seed: int
    seed: int


# Clients of one pool use the same keys. A client ignores results of other numbers than those that it began.
_NUMBERS = itertools.count()


@dataclass
class _Episode:
    request: EpisodeRequest
    limits: EpisodeLimits
    deadline: float
    messages: list[Message] = field(default_factory=list)
    tools: Tools = ()
    record: TokenRecord | None = None
    turns: list[EpisodeTurn] = field(default_factory=list)
    rewritten: int = 0
    samples: bool = False  # the engines sample an answer
    sampled_before_s: float = 0.0  # seconds in which the engines had sampled when the environment began its turn
    number: int = field(default_factory=_NUMBERS.__next__)  # in its pool


class EpisodeClient:
    """Plays episodes with a client of the generation engines and with environments.

    One thread uses it. Episodes make progress while it calls `poll`. The tokens that the model sampled are never
    encoded again: a turn's prompt is every recorded token and the tokens of the new messages.

    Args:
        client: the engines.
        environments: pool of each block.
        limits: limits of the episodes of each block.
        tokenizer: tokenizer of the model.
        chat: chat template, and system prompts for conversations that begin without one.
        sampling: sampling of one turn; `num_samples` and `max_new_tokens` are ignored.
        format_penalty: added to the reward of every answer that the environment could not understand.
    """

    def __init__(
        self,
        client: StreamClient,
        environments: Mapping[str, EnvironmentPool],
        limits: Mapping[str, EpisodeLimits],
        tokenizer: Any,
        chat: ChatFormat,
        sampling: Sampling,
        format_penalty: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._environments = environments
        self._tokenizer = tokenizer
        self._chat = chat
        self._template = chat.templates()[chat.template]
        self._sampling = sampling
        self._limits = limits
        self._format_penalty = format_penalty
        self._clock = clock
        self._episodes: dict[int, _Episode] = {}
        self._keys: dict[int, int] = {}  # by number in the pool
        self._finished: list[FinishedRequest] = []
        self._sampled_s = 0.0  # seconds in which the engines sampled any answer
        self._spent_s = self._hidden_s = 0.0

    @property
    def outstanding(self) -> int:
        """Number of episodes that `poll` has not returned."""
        return len(self._episodes) + len(self._finished)

    @property
    def time(self) -> EnvironmentTime:
        """Time of the environments so far, and the part of it in which the engines sampled other answers."""
        return EnvironmentTime(self._spent_s, self._hidden_s)

    def submit(self, requests: Sequence[EpisodeRequest]) -> None:
        """Begin episodes. Their keys must differ from those of the outstanding ones."""
        for request in requests:
            if request.key in self._episodes:
                raise ValueError(f"episode {request.key} is outstanding already; give every episode another key")
            limits = self._limits[request.environment]
            deadline = self._clock() + limits.timeout_s
            episode = _Episode(request, limits, deadline, sampled_before_s=self._sampled_s)
            self._episodes[request.key], self._keys[episode.number] = episode, request.key
            self._pool(request.key).start(episode.number, request.row, request.row_seed)

    def poll(self, timeout_s: float) -> list[FinishedRequest]:
        """Play for about `timeout_s`, or until an episode ends; return all that ended, as responses with `episode`.

        Raises:
            RollGspoError: the engines failed, a template rejects a conversation, or no environment can be started.
        """
        until = self._clock() + timeout_s
        while self._episodes and not self._finished:
            left = min(max(0.0, until - self._clock()), _SLICE_S)
            sampling = any(episode.samples for episode in self._episodes.values())
            pools = [pool for name, pool in self._environments.items() if self._plays(name)]
            for pool in pools:
                for played in pool.take(0.0 if sampling else left / len(pools)):
                    self._take_played(played)
            if sampling:
                began = self._clock()
                answers = self._client.poll(left)
                self._sampled_s += self._clock() - began
                for key, completion in answers:
                    self._take_answer(key, completion)
            self._end_late()
            if self._clock() >= until:
                break
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Drop all episodes."""
        self.abort(list(self._episodes))

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Drop episodes; return the tokens of those that were outstanding. An episode that ended is ignored."""
        known = {key: self._episodes[key] for key in keys if key in self._episodes}
        sampling = [key for key, episode in known.items() if episode.samples]
        for key, answer in self._client.abort(sampling) if sampling else ():
            record = known[key].record
            assert record is not None
            record.add_answer(answer.token_ids, answer.log_probs, answer.version_runs)
        for key in sampling:
            known[key].samples = False
        return [FinishedRequest(key, _completion(self._drop(key), "partial")) for key in known]

    def partials(self) -> list[FinishedRequest]:
        """Return no episode: an environment cannot be saved, so that an unfinished episode begins again."""
        return []

    def _pool(self, key: int) -> EnvironmentPool:
        return self._environments[self._episodes[key].request.environment]

    def _plays(self, name: str) -> bool:
        return any(episode.request.environment == name for episode in self._episodes.values())

    def _drop(self, key: int) -> _Episode:
        pool, episode = self._pool(key), self._episodes.pop(key)
        pool.end(episode.number)
        del self._keys[episode.number]
        if episode.samples:
            self._client.abort([key])
        return episode

    def _take_played(self, played: Played) -> None:
        key = self._keys.get(played.episode)
        if key is None:
            return
        episode, result = self._episodes[key], played.result
        self._spent_s += played.seconds
        self._hidden_s += min(played.seconds, self._sampled_s - episode.sampled_before_s)
        if isinstance(result, Failure):
            self._end(key, FAILED, result)
        elif isinstance(result, Start):
            self._begin(key, episode, result)
        else:
            reward = result.reward + (self._format_penalty if result.invalid else 0.0)
            episode.turns[-1] = EpisodeTurn(
                episode.turns[-1].answer, result.messages, reward, result.invalid, result.metrics
            )
            self._continue(key, episode, result)

    def _begin(self, key: int, episode: _Episode, start: Start) -> None:
        name, longest = episode.request.environment, episode.limits.max_prompt_tokens
        episode.messages, episode.tools = list(self._chat.with_system(start.messages, name)), start.tools
        prompt = encode_chat(self._tokenizer, episode.messages, self._template, episode.tools, f"environment {name}")
        episode.record = TokenRecord(tuple(prompt))
        if len(prompt) > longest:
            reason = f"the first prompt has {len(prompt)} tokens, more than prompt_length {longest}; raise it"
            self._end(key, FAILED, Failure(reason))
            return
        self._request(key, episode, episode.record)

    def _request(self, key: int, episode: _Episode, record: TokenRecord) -> None:
        left = episode.limits.max_tokens - len(record.token_ids)
        sampling = replace(self._sampling, max_new_tokens=min(episode.limits.max_turn_tokens, left))
        seed = turn_seed(episode.request.seed, len(episode.turns))
        self._client.submit([GenerationRequest(key, record.next_prompt, sampling, seed)])
        episode.samples = True

    def _take_answer(self, key: int, completion: Completion) -> None:
        episode = self._episodes.get(key)
        if episode is None or episode.record is None:
            return
        episode.samples = False
        episode.record.add_answer(completion.token_ids, completion.log_probs, completion.version_runs)
        text = self._text_of(completion)
        episode.messages.append({"role": "assistant", "content": text})
        episode.turns.append(EpisodeTurn(text))
        episode.sampled_before_s = self._sampled_s
        self._pool(key).step(episode.number, len(episode.turns), text)

    def _text_of(self, completion: Completion) -> str:
        return response_text(self._tokenizer, completion.token_ids, self._sampling.stop_token_ids)

    def _continue(self, key: int, episode: _Episode, reply: Reply) -> None:
        record = episode.record
        assert record is not None
        if reply.done or len(episode.turns) >= episode.limits.max_turns:
            self._end(key, DONE if reply.done else TURN_LIMIT)
            return
        renderer = TurnRenderer(
            self._tokenizer, self._template, episode.tools, f"environment {episode.request.environment}"
        )
        given = renderer.following(episode.messages, reply.messages, record.token_ids[-1])
        if len(record.token_ids) + len(given) >= episode.limits.max_tokens:
            self._end(key, TOKEN_LIMIT)
            return
        recorded = self._tokenizer.decode([*record.prompt_ids, *record.token_ids[:-1]])
        episode.rewritten += not renderer.keeps(episode.messages, reply.messages, recorded)
        record.add_given(given)
        episode.messages += reply.messages
        self._request(key, episode, record)

    def _end_late(self) -> None:
        now = self._clock()
        for key in [key for key, episode in self._episodes.items() if now >= episode.deadline]:
            self._end(key, TIME_LIMIT)

    def _end(self, key: int, reason: str, failure: Failure | None = None) -> None:
        episode = self._drop(key)
        record = episode.record
        if record is None:
            failure = failure or Failure(f"the environment did not begin within {episode.limits.timeout_s:g} s")
            record = episode.record = TokenRecord(episode.request.prompt)
        summary = Episode(
            prompt_ids=record.prompt_ids,
            prompt_text=self._tokenizer.decode(record.prompt_ids),
            mask=tuple(record.mask),
            turn_ends=tuple(record.turn_ends),
            turns=tuple(episode.turns),
            end=reason if failure is None else FAILED,
            failed=None if failure is None else failure.reason,
            traceback="" if failure is None else failure.traceback,
            num_rewritten=episode.rewritten,
        )
        finish_reason = "stop" if reason == DONE else "length"
        completion = replace(_completion(episode, finish_reason), episode=summary)
        self._finished.append(FinishedRequest(key, completion))


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn's sampling; turn 0 has the seed of the episode."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:6], "big")


def _completion(episode: _Episode, finish_reason: str) -> Completion:
    record = episode.record or TokenRecord(episode.request.prompt)
    return Completion(
        tuple(record.token_ids), tuple(record.log_probs), finish_reason, version_runs=tuple(record.version_runs)
    )
