"""Episodes that the user's own programs play. Each has its key for the endpoint, through which it calls the model."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from roll_gspo.batch import Completion
from roll_gspo.data.rendering import response_text
from roll_gspo.data.templates import ChatTemplate
from roll_gspo.errors import DataError
from roll_gspo.roles.agents.conversation import Conversations, Extension
from roll_gspo.roles.agents.outcome import Credit, Ending, episode_completion, partial_completion
from roll_gspo.roles.agents.program import AgentCommand, AgentProgram
from roll_gspo.roles.agents.protocol import RefusedError, RewardPost
from roll_gspo.roles.agents.responses import Answer
from roll_gspo.roles.agents.sampled_text import read_answer
from roll_gspo.roles.agents.server import AgentServer, ChatCall, Inbox, RewardCall
from roll_gspo.roles.episodes import DONE, TOKEN_LIMIT, TURN_LIMIT, EpisodeRequest
from roll_gspo.roles.request_stream import StreamClient
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling
from roll_gspo.tools.calls import CallFormat

logger = logging.getLogger(__name__)
_SLICE_S = 0.05
_EXIT_S = 10.0  # for a program that posted `done`


@dataclass(frozen=True)
class AgentLimits:
    """Limits of an episode that a program plays.

    Attributes:
        max_requests: number of answers of the model.
        max_turn_tokens: tokens per answer.
        max_tokens: tokens of a conversation after its first prompt, sampled and given.
        max_length: tokens of a conversation, including its first prompt.
        timeout_s: seconds from the start of the program. Time in which nobody calls `poll` does not count.
        max_concurrent: number of programs that run at the same time; further ones wait.
    """

    max_requests: int
    max_turn_tokens: int
    max_tokens: int
    max_length: int
    timeout_s: float
    max_concurrent: int


@dataclass(eq=False)
class _Episode:
    request: EpisodeRequest
    program: AgentProgram
    api_key: str
    deadline: float
    conversations: Conversations
    credits: list[Credit] = field(default_factory=list)
    num_requests: int = 0
    limit: str = DONE  # the limit that a request has met, or `done`
    asked: Counter[bytes] = field(default_factory=Counter)


class _Sampled(NamedTuple):
    """A request that the engines answer."""

    key: int
    call: ChatCall
    extension: Extension


class AgentClient:
    """Plays episodes: starts a program for each, answers its requests with the engines and takes its rewards.

    One thread uses it. Episodes make progress while it calls `poll`. An episode fails if its program fails, takes too
    long, or ends without a reward.

    Args:
        client: the engines.
        server: the endpoint.
        command: the program.
        tokenizer: tokenizer of the model.
        template: chat template.
        sampling: sampling of one answer; `num_samples` and `max_new_tokens` are ignored.
        limits: limits of an episode.
        call_format: format of the calls of tools; None leaves them in the text.
        format_penalty: added to the reward of every answer with calls that cannot be read.
    """

    def __init__(
        self,
        client: StreamClient,
        server: AgentServer,
        command: AgentCommand,
        tokenizer: Any,
        template: ChatTemplate,
        sampling: Sampling,
        limits: AgentLimits,
        call_format: CallFormat | None = None,
        format_penalty: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._server = server
        self._command = command
        self._tokenizer = tokenizer
        self._template = template
        self._sampling = sampling
        self._limits = limits
        self._call_format = call_format
        self._format_penalty = format_penalty
        self._clock = clock
        self._inbox: Inbox = SimpleQueue()
        self._waiting: deque[EpisodeRequest] = deque()
        self._episodes: dict[int, _Episode] = {}
        self._key_of: dict[str, int] = {}  # by API key
        self._leaving: list[tuple[AgentProgram, float]] = []
        self._sampled: dict[int, _Sampled] = {}
        self._numbers = itertools.count()
        self._finished: list[FinishedRequest] = []
        self._ignored: Counter[str] = Counter()
        self._unpolled_s, self._polled_until = 0.0, clock()

    @property
    def outstanding(self) -> int:
        """Number of episodes that `poll` has not returned."""
        return len(self._waiting) + len(self._episodes) + len(self._finished)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running programs."""
        return [episode.program.pid for episode in self._episodes.values()]

    def submit(self, requests: Sequence[EpisodeRequest]) -> None:
        """Begin episodes. Their keys must differ from those of the outstanding ones."""
        for request in requests:
            if request.key in self._episodes or any(waiting.key == request.key for waiting in self._waiting):
                raise ValueError(f"episode {request.key} is outstanding already; give every episode another key")
            self._waiting.append(request)

    def poll(self, timeout_s: float) -> list[FinishedRequest]:
        """Play for about `timeout_s`, or until an episode ends; return all that ended, as responses with `episode`.

        Raises:
            RollGspoError: the engines failed.
        """
        begun = self._clock()
        self._unpolled_s += begun - self._polled_until
        while self.outstanding and not self._finished:
            self._start_programs()
            left = min(max(0.0, begun + timeout_s - self._clock()), _SLICE_S)
            self._take_calls(0.0 if self._sampled else left)
            self._forget_cancelled()
            if self._sampled:
                for number, completion in self._client.poll(left):
                    self._answer(number, completion)
            self._check_programs()
            if self._clock() >= begun + timeout_s:
                break
        self._polled_until = self._clock()
        finished, self._finished = self._finished, []
        return finished

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Drop episodes; return the tokens of those that were outstanding. An episode that ended is ignored."""
        wanted = set(keys)
        dropped = {request.key: Conversations(self._tokenizer, self._template) for request in self._waiting}
        self._waiting = deque(request for request in self._waiting if request.key not in wanted)
        dropped |= {key: self._drop(key).conversations for key in list(self._episodes) if key in wanted}
        found = [(key, conversations) for key, conversations in dropped.items() if key in wanted]
        return [FinishedRequest(key, partial_completion(conversations)) for key, conversations in found]

    def partials(self) -> list[FinishedRequest]:
        """Return no episode: a program cannot be saved, so that an unfinished episode begins again."""
        return []

    def close(self) -> None:
        """Drop all episodes and end their programs."""
        self._waiting.clear()
        for key in list(self._episodes):
            self._drop(key)
        for program, _ in self._leaving:
            program.kill()
        self._leaving.clear()
        self._take_calls(0.0)
        for name, count in self._ignored.items():
            logger.warning("agent: %s of %d requests was ignored: training samples with that of the run", name, count)
        self._ignored.clear()

    # programs

    def _now(self) -> float:
        return self._clock() - self._unpolled_s

    def _start_programs(self) -> None:
        while self._waiting and len(self._episodes) + len(self._leaving) < self._limits.max_concurrent:
            request = self._waiting.popleft()
            api_key = self._server.open(self._inbox)
            self._key_of[api_key] = request.key
            program = AgentProgram(self._command, self._server.base_url, api_key, request.row, request.row_seed)
            deadline = self._now() + self._limits.timeout_s
            conversations = Conversations(self._tokenizer, self._template)
            self._episodes[request.key] = _Episode(request, program, api_key, deadline, conversations)

    def _check_programs(self) -> None:
        for key, episode in list(self._episodes.items()):
            code = episode.program.poll()
            if code is not None:
                self._end(key, self._ending(episode, code))
            elif self._now() >= episode.deadline:
                failure = f"agent.command: not done after timeout_s {self._limits.timeout_s:g}"
                self._end(key, Ending.failed(failure, episode.program.last_errors()))
        for program, deadline in list(self._leaving):
            if program.poll() is not None or self._now() >= deadline:
                program.kill()
                self._leaving.remove((program, deadline))

    def _ending(self, episode: _Episode, code: int) -> Ending:
        errors = episode.program.last_errors()
        if code:
            return Ending.failed(f"agent.command: exit code {code}", errors)
        if not episode.conversations.num_answers:
            return Ending.failed("agent.command: the program ended, but has not asked the model", errors)
        printed = episode.program.printed_reward()
        if not episode.credits and printed is not None:
            episode.credits.append(Credit(episode.conversations.num_answers, RewardPost(reward=printed)))
        if not episode.credits:
            what = 'POST {"reward": ...} to $OPENAI_BASE_URL/reward, or print it in the last line'
            return Ending.failed(f"agent.command: the program ended without a reward; {what}", errors)
        return Ending(episode.limit)

    def _end(self, key: int, ending: Ending, leaves: bool = False) -> None:
        episode = self._drop(key, kill=not leaves)
        if leaves:
            self._leaving.append((episode.program, self._now() + _EXIT_S))
        conversations, row_prompt = episode.conversations, episode.request.prompt
        completion = episode_completion(conversations, episode.credits, ending, row_prompt, self._format_penalty)
        self._finished.append(FinishedRequest(key, completion))

    def _drop(self, key: int, kill: bool = True) -> _Episode:
        episode = self._episodes.pop(key)
        self._server.revoke(episode.api_key)
        del self._key_of[episode.api_key]
        numbers = [number for number, sampled in self._sampled.items() if sampled.key == key]
        self._client.abort(numbers)
        for number in numbers:
            sampled = self._sampled.pop(number)
            episode.conversations.drop(sampled.extension)
            _fail(sampled.call.answer, _ended())
        if kill:
            episode.program.kill()
        return episode

    # requests

    def _take_calls(self, timeout_s: float) -> None:
        """Take the requests that have arrived. Wait up to `timeout_s` for one."""
        with contextlib.suppress(Empty):
            self._take(self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait())
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, call: ChatCall | RewardCall) -> None:
        key = self._key_of.get(call.api_key)
        if key is None:
            _fail(call.answer, _ended())
        elif isinstance(call, RewardCall):
            self._take_reward(key, call, self._episodes[key])
        elif not call.answer.cancelled():
            try:
                self._ask(key, call, self._episodes[key])
            except RefusedError as error:
                _fail(call.answer, error)

    def _take_reward(self, key: int, call: RewardCall, episode: _Episode) -> None:
        if not episode.conversations.num_answers:
            _fail(call.answer, RefusedError("a reward needs an answer of the model; send a chat request first"))
            return
        episode.credits.append(Credit(episode.conversations.num_answers, call.post))
        _succeed(call.answer, None)
        if call.post.done:
            self._end(key, Ending(episode.limit), leaves=True)

    def _ask(self, key: int, call: ChatCall, episode: _Episode) -> None:
        limits, request = self._limits, call.request
        self._count_ignored("temperature", request.temperature, self._sampling.temperature)
        self._count_ignored("top_p", request.top_p, self._sampling.top_p)
        if episode.num_requests >= limits.max_requests:
            episode.limit = TURN_LIMIT
            message = f"the episode has had {limits.max_requests} answers (agent.max_requests); post the reward now"
            raise RefusedError(message, code="max_requests", status=429)
        try:
            extension = episode.conversations.extend(call.messages, tuple(request.tools or ()))
        except DataError as error:
            raise RefusedError(str(error), "messages") from error
        prompt = extension.prompt
        room = min(limits.max_tokens - extension.num_response_tokens, limits.max_length - len(prompt))
        if room <= 0:
            episode.conversations.drop(extension)
            episode.limit = TOKEN_LIMIT
            raise RefusedError(
                f"the messages leave no room for an answer: they have {len(prompt)} tokens (of {limits.max_length}), "
                f"{extension.num_response_tokens} of them after the first prompt (of {limits.max_tokens}); post the "
                "reward now",
                "messages",
                "context_length_exceeded",
            )
        max_tokens = min(request.max_answer_tokens or room, limits.max_turn_tokens, room)
        digest = hashlib.sha256(repr(prompt).encode()).digest()
        seed = _seed(episode.request.seed, digest, episode.asked[digest])
        number = next(self._numbers)
        sampling = replace(self._sampling, max_new_tokens=max_tokens)
        self._client.submit([GenerationRequest(number, prompt, sampling, seed)])
        episode.asked[digest] += 1
        episode.num_requests += 1
        self._sampled[number] = _Sampled(key, call, extension)

    def _count_ignored(self, name: str, value: float | None, own: float) -> None:
        if value is None or value == own:
            return
        if not self._ignored[name]:
            message = "agent: %s %g of a request is ignored: training samples with %g; remove it from the program"
            logger.warning(message, name, value, own)
        self._ignored[name] += 1

    def _forget_cancelled(self) -> None:
        """Stop sampling for agents that have hung up."""
        for number in [number for number, sampled in self._sampled.items() if sampled.call.answer.cancelled()]:
            self._client.abort([number])
            key, _, extension = self._sampled.pop(number)
            self._episodes[key].conversations.drop(extension)

    def _answer(self, number: int, completion: Completion) -> None:
        sampled = self._sampled.pop(number, None)
        if sampled is None:
            return  # dropped when it had just ended
        key, call, extension = sampled
        tokenizer, token_ids = self._tokenizer, completion.token_ids
        text = response_text(tokenizer, token_ids, self._sampling.stop_token_ids)
        read = read_answer(text, self._call_format if call.request.tools else None, number)
        prompt_tokens = len(extension.prompt)
        self._episodes[key].conversations.add(extension, completion, read)
        texts = [tokenizer.decode([token]) for token in token_ids] if call.request.logprobs else []
        answer = Answer(
            completion_id=f"chatcmpl-{key}-{number}",
            content=read.content,
            tool_calls=read.tool_calls,
            finish_reason="length" if completion.finish_reason == "length" else read.finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(token_ids),
            tokens=tuple(zip(texts, completion.log_probs, strict=False)),
            version=completion.version_runs[-1][0] if completion.version_runs else None,
        )
        _succeed(call.answer, answer)


def _seed(seed: int, prompt: bytes, repeats: int) -> int:
    """Return the seed of an answer. It depends on the prompt, not on the order of parallel requests."""
    digest = hashlib.sha256(f"{seed}/{repeats}/".encode() + prompt).digest()
    return int.from_bytes(digest[:6], "big")


def _ended() -> RefusedError:
    return RefusedError("the episode has ended", code="invalid_api_key", status=401)


def _succeed(future: Future[Any], value: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # the agent has hung up
        future.set_result(value)


def _fail(future: Future[Any], error: RefusedError) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
