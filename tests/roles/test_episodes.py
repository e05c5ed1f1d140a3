"""Episodes over a scripted model and real environment processes."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.adding_machine import typed_columns
from roll_gspo.environments.pool import EnvironmentPool
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.episode import Episode
from roll_gspo.models.tiny import END, byte_tokenizer
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits, EpisodeRequest, turn_seed
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling

TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)
SAMPLING = Sampling(1, max_new_tokens=16, stop_token_ids=(END_ID,))
LIMITS = EpisodeLimits(max_turns=8, max_prompt_tokens=99, max_tokens=200, max_turn_tokens=16, timeout_s=60.0)


def limits(max_turns: int, max_tokens: int, timeout_s: float) -> EpisodeLimits:
    return replace(LIMITS, max_turns=max_turns, max_tokens=max_tokens, timeout_s=timeout_s)


class ScriptedModel:
    """An engine whose answers are a function of the prompt's text. Log-probs are -1, -2, ... in each answer."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.requests: list[GenerationRequest] = []
        self.waiting: dict[int, GenerationRequest] = {}
        self.version = 0

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.requests += requests
        self.waiting |= {request.key: request for request in requests}

    def advance(self, seconds: float) -> list[FinishedRequest]:
        finished = [FinishedRequest(key, self._completion(request)) for key, request in self.waiting.items()]
        self.waiting.clear()
        return finished

    def _completion(self, request: GenerationRequest) -> Completion:
        text = self.answer(TOKENIZER.decode(request.prompt))
        tokens = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], END_ID][: request.sampling.max_new_tokens]
        log_probs = tuple(-float(number) for number in range(1, len(tokens) + 1))
        reason = "stop" if tokens[-1] == END_ID else "length"
        return Completion(tuple(tokens), log_probs, reason, None, ((self.version, len(tokens)),))

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        return [FinishedRequest(k, Completion((), (), "partial")) for k in keys if self.waiting.pop(k, None)]

    def partials(self) -> list[FinishedRequest]:
        return []


@pytest.fixture(scope="module")
def machine() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(EnvironmentSpec("adding_machine"), 1, 64, 30.0, "custom_envs.sums") as pool:
        yield pool


@pytest.fixture(scope="module")
def echo() -> Iterator[EnvironmentPool]:
    folder = str(Path(__file__).parents[1] / "environments")
    sys.path.insert(0, folder)
    with EnvironmentPool(EnvironmentSpec("played_environments.Echo"), 1, 8, 30.0, "custom_envs.echo") as pool:
        yield pool
    sys.path.remove(folder)


def row(text: str) -> dict[str, object]:
    return {"id": text, "text": text, "messages": [{"role": "user", "content": text}]}


def play(
    model: ScriptedModel, pool: EnvironmentPool, texts: Sequence[str], bounds: EpisodeLimits = LIMITS
) -> dict[int, Completion]:
    client = EpisodeClient(LocalStream(model).open(), {"env": pool}, {"env": bounds}, TOKENIZER, ChatFormat(), SAMPLING)
    client.submit([EpisodeRequest(i, (1, 2), "env", row(text), 7, seed=100 + i) for i, text in enumerate(texts)])
    finished: dict[int, Completion] = {}
    while client.outstanding:
        finished |= dict(client.poll(30.0))
    return finished


def adding(prompt: str) -> str:
    """Return the right next answer of the adding machine."""
    turns = prompt.replace(END, "").split("<|user|>")[1:]
    a, b = (int(number) for number in turns[0].removesuffix("<|assistant|>").split("<|assistant|>")[0].split("+"))
    answers = [m["content"] for m in typed_columns(a, b, random.Random(0)) if m["role"] == "assistant"]
    return answers[len(turns) - 1]


def episode_of(completion: Completion) -> Episode:
    assert completion.episode is not None
    return completion.episode


@pytest.mark.parametrize(("text", "result"), [("347+86", "=433"), ("5+9=", "=14"), ("100+23", "=123")])
def test_right_answers_are_rewarded(machine: EnvironmentPool, text: str, result: str):
    episode = episode_of(play(ScriptedModel(adding), machine, [text])[0])
    assert episode.turns[-1].answer == result
    assert (episode.reward, episode.end, episode.num_rewritten) == (1.0, "done", 0)


def test_tokens_are_those_that_were_sampled_and_given(machine: EnvironmentPool):
    model = ScriptedModel(adding)
    completion = play(model, machine, ["12+3"])[0]
    episode, tokens = episode_of(completion), completion.token_ids
    text = "<|user|>12+3<|assistant|>2+3<|end|><|user|>5<|assistant|>1+0<|end|><|user|>1<|assistant|>=15<|end|>"
    assert TOKENIZER.decode([*episode.prompt_ids, *tokens]) == text
    sampled = [token for token, is_sampled in zip(tokens, episode.mask, strict=True) if is_sampled]
    assert TOKENIZER.decode(sampled) == "2+3<|end|>1+0<|end|>=15<|end|>"
    assert [value for value in completion.log_probs if value] == [-1.0, -2.0, -3.0, -4.0] * 3
    assert completion.version_runs == ((0, len(tokens)),)
    # each turn's prompt extends the one before by exactly the recorded tokens
    prompts = [request.prompt for request in model.requests]
    assert all(later[: len(prompt)] == prompt for prompt, later in itertools.pairwise(prompts))
    whole = (*episode.prompt_ids, *tokens)
    starts = [len(episode.prompt_ids), *(len(episode.prompt_ids) + end for end in episode.turn_ends[:-1])]
    assert [whole[: len(prompt)] for prompt in prompts] == prompts
    assert all(len(prompt) >= start for prompt, start in zip(prompts, starts, strict=True))
    assert [request.seed for request in model.requests] == [100, turn_seed(100, 1), turn_seed(100, 2)]


def test_batch_trains_on_sampled_tokens_only(machine: EnvironmentPool):
    texts = ["12+3", "347+86"]
    played = play(ScriptedModel(adding), machine, texts)
    prompts = [Prompt(episode_of(played[i]).prompt_ids, text, row(text)) for i, text in enumerate(texts)]
    rollouts = Rollouts.collate(prompts, [[played[0]], [played[1]]], pad=0, weights_version=0)
    mask, sequences = rollouts.sequences.response_mask, rollouts.sequences
    for i, expected in enumerate(("2+3<|end|>1+0<|end|>=15<|end|>", "7+6<|end|>4+8+1<|end|>3+1<|end|>=433<|end|>")):
        assert TOKENIZER.decode(sequences.response_ids[i][mask[i]].tolist()) == expected
    assert (rollouts.rollout_log_probs[mask] < 0).all()
    assert (rollouts.rollout_log_probs[~mask] == 0).all()


def test_many_episodes_do_not_mix(machine: EnvironmentPool):
    texts = [f"{a}+{b}" for a in range(10, 26) for b in (3, 47)]
    played = play(ScriptedModel(adding), machine, texts)
    for number, text in enumerate(texts):
        a, b = text.split("+")
        episode = episode_of(played[number])
        assert episode.turns[-1].answer == f"={int(a) + int(b)}"
        assert episode.reward == 1.0


def test_unreadable_answers_end_the_episode_without_reward(machine: EnvironmentPool):
    episode = episode_of(play(ScriptedModel(lambda _: "hm"), machine, ["1+2"])[0])
    assert (episode.reward, episode.end, len(episode.turns)) == (0.0, "done", 3)
    assert all(turn.invalid for turn in episode.turns)


def test_penalty_belongs_to_the_turn_that_earned_it(machine: EnvironmentPool):
    client = EpisodeClient(
        LocalStream(ScriptedModel(lambda prompt: "=3" if "?" in prompt else "hm")).open(),
        *({"env": machine}, {"env": LIMITS}, TOKENIZER, ChatFormat(), SAMPLING),
        format_penalty=-0.25,
    )
    client.submit([EpisodeRequest(0, (1, 2), "env", row("1+2"), 7, seed=1)])
    (finished,) = client.poll(30.0)
    episode = episode_of(finished.completion)
    assert [turn.reward for turn in episode.turns] == [-0.25, 1.0]
    assert episode.reward == 0.75


def test_limits_end_episodes(echo: EnvironmentPool):
    model = ScriptedModel(lambda _: "ab")
    turns = episode_of(play(model, echo, ["x"], limits(3, 200, 60.0))[0])
    assert (turns.end, len(turns.turns), turns.reward) == ("max_turns", 3, 1.0 + 2.0 + 3.0)
    # "ab<|end|>" and "<|user|>ab<|assistant|>" are 7 tokens per turn
    tokens = play(model, echo, ["x"], limits(9, 16, 60.0))[0]
    assert (episode_of(tokens).end, len(tokens.token_ids)) == ("max_tokens", 16)
    cut = play(model, echo, ["x"], limits(9, 9, 60.0))[0]
    assert (episode_of(cut).end, len(cut.token_ids), episode_of(cut).turns[-1].answer) == ("max_tokens", 9, "ab")


def test_failed_environment_is_no_reward(echo: EnvironmentPool):
    played = play(ScriptedModel(lambda prompt: "raise" if "bad" in prompt else "ok"), echo, ["bad", "good"])
    bad, good = episode_of(played[0]), episode_of(played[1])
    assert (bad.end, bad.failed, good.end, good.failed) == ("failed", "RuntimeError: broken", "max_turns", None)
    assert "played_environments.py" in bad.traceback


def test_environment_that_does_not_begin_keeps_the_prompt_of_the_row(echo: EnvironmentPool):
    client = EpisodeClient(
        LocalStream(ScriptedModel(str)).open(), {"env": echo}, {"env": LIMITS}, TOKENIZER, ChatFormat(), SAMPLING
    )
    client.submit([EpisodeRequest(0, (1, 2), "env", {"fails": True}, 7, seed=1)])
    (finished,) = client.poll(30.0)
    episode = episode_of(finished.completion)
    assert (episode.failed, episode.prompt_ids, finished.completion.token_ids) == (
        "ValueError: no such level",
        (1, 2),
        (),
    )


def test_replies_to_a_dropped_episode_are_not_those_of_a_later_one(echo: EnvironmentPool):
    """A run validates again and again with one pool, and the keys of the episodes are the same each time."""
    slow, model = ScriptedModel(lambda _: "sleep 0.4"), ScriptedModel(lambda _: "sleep 0.8")
    client = EpisodeClient(LocalStream(slow).open(), {"env": echo}, {"env": LIMITS}, TOKENIZER, ChatFormat(), SAMPLING)
    client.submit([EpisodeRequest(0, (1, 2), "env", row("x"), 7, seed=1)])
    while not slow.requests or slow.waiting:
        client.poll(0.05)
    client.close()
    episode = episode_of(play(model, echo, ["y"], limits(1, 200, 60.0))[0])
    assert [turn.messages[0]["content"] for turn in episode.turns] == ["sleep 0.8"]


def test_late_episode_ends_and_closes(echo: EnvironmentPool):
    episode = episode_of(play(ScriptedModel(lambda _: "sleep 20"), echo, ["x"], limits(3, 200, 1.0))[0])
    assert (episode.end, len(episode.turns), episode.turns[0].messages) == ("timeout", 1, ())


class HoldingModel(ScriptedModel):
    """A model that answers prompts with `busy` once it is released, and all others at once.

    Every call takes an hour of the client's clock, so that no environment takes longer.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__(answer)
        self.hours = 0
        self.is_released = False

    def advance(self, seconds: float) -> list[FinishedRequest]:
        self.hours += 1
        time.sleep(0.01)
        held = {k: r for k, r in self.waiting.items() if not self.is_released and "busy" in TOKENIZER.decode(r.prompt)}
        ready = {key: request for key, request in self.waiting.items() if key not in held}
        self.waiting = held
        return [FinishedRequest(key, self._completion(request)) for key, request in ready.items()]


@pytest.mark.parametrize(("texts", "is_hidden"), [(["idle"], False), (["idle", "busy"], True)])
def test_time_of_environments_is_hidden_while_the_engines_sample(
    echo: EnvironmentPool, texts: list[str], is_hidden: bool
):
    model = HoldingModel(lambda prompt: "sleep 0.2" if "idle" in prompt else "ok")
    client = EpisodeClient(
        *(LocalStream(model).open(), {"env": echo}, {"env": limits(1, 200, 1e9)}, TOKENIZER, ChatFormat(), SAMPLING),
        clock=lambda: 3600.0 * model.hours,
    )
    client.submit([EpisodeRequest(i, (1, 2), "env", row(text), 7, seed=i) for i, text in enumerate(texts)])
    while client.outstanding:
        model.is_released = bool(client.poll(3600.0 * 1000))
    total_s, hidden_s = client.time
    assert total_s > 0.2
    assert 0.2 < hidden_s < total_s if is_hidden else hidden_s == 0.0
