"""Agents behind the endpoint: OpenAI's own client, real programs, and a real engine with random weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_programs import ONE_TURN, TWO_TURNS

from roll_gspo.batch import Completion, Sequences
from roll_gspo.data.templates import TEMPLATES
from roll_gspo.episode import Episode
from roll_gspo.models import tiny
from roll_gspo.roles.agents.client import AgentClient, AgentLimits
from roll_gspo.roles.agents.program import AgentCommand
from roll_gspo.roles.agents.protocol import RefusedError, parse_chat
from roll_gspo.roles.agents.sampled_text import read_answer
from roll_gspo.roles.agents.server import AgentServer
from roll_gspo.roles.episodes import EpisodeRequest
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.tools.calls import FORMATS

openai = pytest.importorskip("openai", reason="openai is not installed")

TOKENIZER = tiny.byte_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(tiny.END)
TEMPERATURE = 0.8
SAMPLING = Sampling(1, 16, temperature=TEMPERATURE, stop_token_ids=(END_ID,))
LIMITS = AgentLimits(
    max_requests=8, max_turn_tokens=16, max_tokens=100, max_length=300, timeout_s=60.0, max_concurrent=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(tiny.build_model(tiny.TINY_MODELS["tiny_qwen3"], seed=0), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def trainer(folder: Path) -> HfTrain:
    setup = ModelSetup(folder, torch.float32, micro_batch_size=2, temperature=TEMPERATURE, seed=0)
    return HfTrain(setup, OptimizerSetup(1e-3, 1, 1.0), HfConfig())


@pytest.fixture(scope="module")
def engine(folder: Path, trainer: HfTrain) -> HfInfer:
    engine = HfInfer(ModelSetup(folder, torch.float32, 1, TEMPERATURE, seed=0), HfConfig())
    engine.update_weights(trainer.weights(), 3)
    return engine


@pytest.fixture(scope="module")
def server() -> Iterator[AgentServer]:
    server = AgentServer(answer_timeout_s=60.0)
    yield server
    server.close()


def make_client(
    engine: HfInfer, server: AgentServer, command: Sequence[str], limits: AgentLimits = LIMITS, **options: Any
) -> AgentClient:
    stream = LocalStream(engine).open()
    return AgentClient(
        stream, server, AgentCommand(tuple(command), **options), TOKENIZER, TEMPLATES["native"], SAMPLING, limits
    )


def request(key: int, **row: Any) -> EpisodeRequest:
    return EpisodeRequest(key, (1, 2), "agent", {"question": "12+3", **row}, row_seed=7, seed=100 + key)


def play(client: AgentClient, *requests: EpisodeRequest) -> dict[int, Completion]:
    client.submit(requests)
    finished: dict[int, Completion] = {}
    while client.outstanding:
        finished |= dict(client.poll(30.0))
    client.close()
    return finished


def episode_of(completion: Completion) -> Episode:
    assert completion.episode is not None
    return completion.episode


def text_of(token_ids: Sequence[int]) -> str:
    return TOKENIZER.decode(token_ids)


@pytest.fixture(scope="module")
def two_turns(engine: HfInfer, server: AgentServer, tmp_path_factory: pytest.TempPathFactory) -> list[Completion]:
    """Return two episodes of the same row, played by a program with OpenAI's client."""
    script = tmp_path_factory.mktemp("agent") / "my_agent.py"
    script.write_text(TWO_TURNS)
    played = play(make_client(engine, server, ["python", str(script)]), request(0), request(1))
    return [played[0], played[1]]


def test_tokens_of_a_conversation_are_those_that_were_sampled_and_given(two_turns: list[Completion]):
    for completion in two_turns:
        episode = episode_of(completion)
        assert (episode.failed, episode.end, episode.num_branches, completion.finish_reason) == (
            None,
            "done",
            1,
            "stop",
        )
        assert text_of(episode.prompt_ids) == "<|system|>Add.<|user|>12+3<|assistant|>"
        assert len(episode.mask) == len(completion.token_ids) == len(completion.log_probs)
        starts = [0, *episode.turn_ends]
        pieces = [completion.token_ids[a:b] for a, b in zip(starts, episode.turn_ends, strict=False)]
        masks = [episode.mask[a:b] for a, b in zip(starts, episode.turn_ends, strict=False)]
        for number, question in enumerate(("", "<|user|>Sure?<|assistant|>", "<|user|>Last?<|assistant|>")):
            given = text_of([t for t, sampled in zip(pieces[number], masks[number], strict=True) if not sampled])
            # an answer that was cut off is ended by the template
            assert given in (question, f"{tiny.END}{question}")
            answer = [t for t, sampled in zip(pieces[number], masks[number], strict=True) if sampled]
            assert 1 <= len(answer) <= (12, 9, 5)[number]
            assert text_of([t for t in answer if t not in (END_ID, 0)]) == episode.turns[number].answer
        assert completion.version_runs == ((3, len(completion.token_ids)),)
    assert two_turns[0].token_ids != two_turns[1].token_ids


def test_rewards_and_metrics_are_posted(two_turns: list[Completion]):
    for completion in two_turns:
        episode = episode_of(completion)
        assert [turn.reward for turn in episode.turns] == [0.0, 0.0, 0.75]
        assert episode.turns[-1].metrics == {"length": len(episode.turns[1].answer)}
        assert [dict(m) for m in episode.turns[0].messages] == [{"role": "user", "content": "Sure?"}]


def test_trainer_has_the_log_probs_of_the_episode(two_turns: list[Completion], trainer: HfTrain):
    episodes = [episode_of(completion) for completion in two_turns]
    sequences = Sequences.collate(
        [e.prompt_ids for e in episodes], [c.token_ids for c in two_turns], 0, [e.mask for e in episodes]
    )
    scores = trainer.score(sequences).log_probs
    for row, completion in enumerate(two_turns):
        torch.testing.assert_close(
            scores[row, : len(completion.log_probs)], torch.tensor(completion.log_probs), atol=1e-4, rtol=0
        )
        assert sum(value != 0 for value in completion.log_probs) == sum(episodes[row].mask)


@pytest.fixture
def one_turn(tmp_path: Path) -> list[str]:
    (tmp_path / "agent.py").write_text(ONE_TURN)
    return ["python", str(tmp_path / "agent.py")]


def test_programs_that_fail_are_no_reward(engine: HfInfer, server: AgentServer, one_turn: list[str]):
    what = ("print", "die", "nothing", "ask nothing")
    played = play(make_client(engine, server, one_turn), *(request(i, then=t) for i, t in enumerate(what)))
    episodes = {then: episode_of(played[i]) for i, then in enumerate(what)}
    assert (episodes["print"].failed, episodes["print"].reward) == (None, 7.0)
    assert episodes["die"].failed == "agent.command: exit code 1"
    assert episodes["die"].traceback.endswith("KeyError: 'no such page'")
    assert "without a reward" in str(episodes["nothing"].failed)
    assert "has not asked the model" in str(episodes["ask nothing"].failed)
    assert [episodes[then].end for then in what] == ["done", *["failed"] * 3]
    assert (episodes["ask nothing"].prompt_ids, played[3].token_ids) == ((1, 2), ())
    assert all(1 <= len(played[i].token_ids) <= 4 for i in range(3))


def test_program_that_hangs_is_killed(engine: HfInfer, server: AgentServer, one_turn: list[str]):
    client = make_client(engine, server, one_turn, AgentLimits(8, 16, 100, 300, timeout_s=2.0, max_concurrent=2))
    client.submit([request(0, then="hang")])
    assert client.poll(0.0) == []
    (pid,) = client.pids
    (finished,) = client.poll(60.0)
    assert "timeout_s 2" in str(episode_of(finished.completion).failed)
    assert not Path(f"/proc/{pid}").exists()
    client.close()


@contextmanager
def connected(engine: HfInfer, server: AgentServer, tmp_path: Path, limits: AgentLimits = LIMITS) -> Iterator[Any]:
    """Yield OpenAI's client with the key of an episode, whose program waits, and the list of finished episodes."""
    file = tmp_path / "key"
    program = ["sh", "-c", f'echo "$OPENAI_API_KEY" > {file}.new; mv {file}.new {file}; sleep 60']
    client = make_client(engine, server, program, limits)
    client.submit([request(0)])
    finished: list[Completion] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            finished.extend(completion for _, completion in client.poll(0.1))
            stop.wait(0.01)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        while not file.exists():
            stop.wait(0.01)
        yield openai.OpenAI(base_url=server.base_url, api_key=file.read_text().strip(), timeout=30.0), finished
    finally:
        stop.set()
        thread.join()
        client.close()


def ask(api: Any, *texts: str, **options: Any) -> Any:
    """Send a conversation of user and assistant messages in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return api.chat.completions.create(model="any", messages=messages, **options)


def test_answers_have_the_form_of_openai(engine: HfInfer, server: AgentServer, tmp_path: Path):
    with connected(engine, server, tmp_path) as (api, _):
        assert [model.id for model in api.models.list().data] == ["policy"]
        answer = ask(api, "1+1", logprobs=True, max_tokens=6, n=1, stop=None, temperature=TEMPERATURE)
        (choice,) = answer.choices
        assert answer.usage.prompt_tokens == len(TOKENIZER.encode("<|user|>1+1<|assistant|>"))
        assert answer.usage.completion_tokens == len(choice.logprobs.content) <= 6
        assert all(token.logprob < 0 for token in choice.logprobs.content)
        assert choice.finish_reason in ("stop", "length")
        assert (choice.message.role, choice.message.tool_calls, answer.model) == ("assistant", None, "any")
        assert answer.system_fingerprint == "weights-3"
        # a message may be a list of parts
        parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
        again = api.chat.completions.create(model="x", messages=[{"role": "user", "content": parts}], max_tokens=6)
        assert again.usage.prompt_tokens == answer.usage.prompt_tokens
        assert again.choices[0].message.content != choice.message.content  # a repeated request has another seed


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["x"]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
    ],
)
def test_parameters_that_change_the_sampling_are_refused(options: dict[str, Any], key: str):
    body = {"messages": [{"role": "user", "content": "x"}], **options.pop("extra_body", {}), **options}
    with pytest.raises(RefusedError) as refused:
        parse_chat(json.dumps(body).encode())
    assert (refused.value.param, refused.value.status) == (key, 400)
    assert str(refused.value).startswith(f"{key}: ")


def test_refusals_reach_the_client_of_openai(
    engine: HfInfer, server: AgentServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    limits = AgentLimits(2, 16, 60, 120, 60.0, 1)
    with connected(engine, server, tmp_path, limits) as (api, finished):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(api, "x", n=2)
        assert refused.value.param == "n"
        image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        with pytest.raises(openai.BadRequestError, match="image_url"):
            api.chat.completions.create(model="x", messages=[{"role": "user", "content": image}])
        with pytest.raises(openai.BadRequestError, match="last message"):
            ask(api, "x", "y")
        with pytest.raises(openai.AuthenticationError):
            ask(api.with_options(api_key="0-wrong"), "x")
        with pytest.raises(openai.AuthenticationError):
            ask(api.with_options(api_key=api.api_key[:-1] + "?"), "x")
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            api.responses.create(model="x", input="y")
        with pytest.raises(openai.BadRequestError) as refused:
            ask(api, "x" * 200)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="reward"):
            api.post("/reward", body={"reward": "much"}, cast_to=object)
        ask(api, "x", temperature=0.0)
        ask(api, "x", temperature=0.0)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(api, "x")
        assert refused.value.code == "max_requests"
        api.post("/reward", body={"reward": 1, "done": True}, cast_to=object)
        with pytest.raises(openai.AuthenticationError):
            ask(api, "x")
    assert episode_of(finished[0]).end == "max_turns"
    assert [record.getMessage() for record in caplog.records][-1].startswith("agent: temperature of 2 requests")


def test_branches_keep_the_tokens_that_were_sampled(engine: HfInfer, server: AgentServer, tmp_path: Path):
    with connected(engine, server, tmp_path) as (api, finished):
        first = ask(api, "a").choices[0].message.content
        second = ask(api, "a", first, "b").choices[0].message.content
        other = ask(api, "a", first, "c").choices[0].message.content  # leaves after the first answer
        ask(api, "a", first, "b", "rewritten", "d")
        api.post("/reward", body={"reward": 1}, cast_to=object)
        last = ask(api, "a", f" {first}\n", "c", other, "e").choices[0].message.content
        api.post("/reward", body={"reward": 2, "done": True}, cast_to=object)
    (completion,) = finished
    episode = episode_of(completion)
    main, (trunk, rewritten) = episode, episode.branches
    assert [turn.answer for turn in trunk.turns] == [first, second]
    assert [turn.answer for turn in main.turns] == [other, last]
    # the reward after the rewritten branch belongs to the last answer before it in the trained one
    assert [turn.reward for turn in main.turns] == [1.0, 2.0]
    tokens = trunk.token_ids[: trunk.turn_ends[0]]
    given = text_of(main.prompt_ids[len(trunk.prompt_ids) + len(tokens) :])
    assert main.prompt_ids[: len(trunk.prompt_ids) + len(tokens)] == (*trunk.prompt_ids, *tokens)
    assert given in ("<|user|>c<|assistant|>", "<|end|><|user|>c<|assistant|>")
    assert text_of(rewritten.prompt_ids).endswith("<|user|>b<|assistant|>rewritten<|end|><|user|>d<|assistant|>")
    assert episode.num_branches == 3


def test_parallel_requests_are_branches_with_their_own_seeds(engine: HfInfer, server: AgentServer, tmp_path: Path):
    with connected(engine, server, tmp_path) as (api, finished):
        threads = [threading.Thread(target=ask, args=(api, text)) for text in ("a", "b", "c", "a")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        api.post("/reward", body={"reward": 1, "done": True}, cast_to=object)
    episode = episode_of(finished[0])
    assert episode.num_branches == 4
    prompts = sorted(text_of(b.prompt_ids) for b in (episode, *episode.branches))
    assert prompts == [f"<|user|>{text}<|assistant|>" for text in "aabc"]


def test_abort_ends_the_program(engine: HfInfer, server: AgentServer):
    client = make_client(engine, server, ["sleep", "60"], AgentLimits(8, 16, 100, 300, 60.0, max_concurrent=1))
    client.submit([request(0), request(1)])
    assert client.poll(0.2) == []
    (pid,) = client.pids
    aborted = client.abort([0, 1, 5])
    assert sorted(key for key, _ in aborted) == [0, 1]
    assert {completion.finish_reason for _, completion in aborted} == {"partial"}
    assert (client.outstanding, client.poll(0.0), Path(f"/proc/{pid}").exists()) == (0, [], False)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('Hm. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "Hm.", [("add", '{"a": 1}')]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        (
            '<think><tool_call></think>x<tool_call>{"name": "f", "arguments": {}}',
            "<think><tool_call></think>x",
            [("f", "{}")],
        ),
        ("no call", "no call", []),
    ],
)
def test_calls_of_tools_are_separated_from_the_text(text: str, content: str, calls: list[tuple[str, str]]):
    answer = read_answer(text, FORMATS["hermes"], 12)
    assert answer.content == content
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in answer.tool_calls] == calls
    assert answer.invalid == ("broken" in text)
    assert all(call["id"] == "000012000" for call in answer.tool_calls)
    assert read_answer(text, None, 12).content == text
