"""Log-probs of episodes: the trainer computes those that the generation engine recorded, for every environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import optimizer_setup
from torch import distributed as dist

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.pool import EnvironmentPool
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.models.tiny import ASSISTANT, END, TINY_MODELS, USER, build_model, byte_tokenizer
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits, EpisodeRequest
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.strategies.base import ModelSetup, Sampling, StreamingStrategy, TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.vllm.config import VllmConfig

NUM_TURNS, NUM_EPISODES, TOLERANCE = 5, 3, 1e-4
TEMPERATURE = 0.3  # the model that calls tools makes few mistakes; answers of the random one stay random
TOKENIZER = byte_tokenizer()
SAMPLING = Sampling(1, 1, TEMPERATURE, stop_token_ids=(TOKENIZER.convert_tokens_to_ids(END),))
QUESTION = [{"role": "user", "content": "What is 12 * 34?"}]
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12 * 34"}}</tool_call>'
ANSWER_TOKENS = {"tool_use": 99}  # a call is longer than the answers that the others cannot understand
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adding_machine": {"max_invalid": NUM_TURNS},
    "frozen_lake": {},
    "sokoban": {"dim_room": [6, 6], "num_boxes": 1},
    "tool_use": {"tools": ["calculator"], "reward": "math_rule", "show_tools": False},
}
TRAINERS = ["hf", pytest.param("megatron", marks=pytest.mark.megatron)]


def learn_to_call(model: Any) -> None:
    """Train a model to answer every prompt with a call of the calculator."""
    turns = f"{USER}{QUESTION[0]['content']}" + f"{ASSISTANT}{CALL}{END}<|tool|>408" * NUM_TURNS
    tokens = torch.tensor([TOKENIZER(turns, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(80):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model with random weights, and one that calls a tool."""
    found = {}
    for name in ("random", "calling"):
        model, found[name] = build_model(TINY_MODELS["tiny_qwen3"], seed=1), tmp_path_factory.mktemp(name)
        if name == "calling":
            learn_to_call(model)
        model.save_pretrained(found[name])
    return found


def setup_of(folder: Path) -> ModelSetup:
    return ModelSetup(folder, torch.float32, micro_batch_size=2, temperature=TEMPERATURE, seed=0)


def trainer(kind: str, folder: Path) -> TrainStrategy:
    if kind == "hf":
        return HfTrain(setup_of(folder), optimizer_setup(), HfConfig())
    engine = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
    from roll_gspo.strategies.megatron.config import MegatronConfig

    return engine.MegatronTrain(setup_of(folder), optimizer_setup(), MegatronConfig())


def play(engine: StreamingStrategy, environment: str) -> list[Completion]:
    """Play episodes with an engine and an environment in a worker process."""
    spec = EnvironmentSpec(environment, ARGUMENTS[environment])
    limits = EpisodeLimits(NUM_TURNS, 2000, 3000, ANSWER_TOKENS.get(environment, 12), 100.0)
    row = {"id": "1", "ground_truth": "408"} | ({"messages": QUESTION} if environment == "tool_use" else {})
    finished: dict[int, Completion] = {}
    with EnvironmentPool(spec, 1, NUM_EPISODES, 60.0, "custom_envs.env") as pool:
        client = EpisodeClient(
            LocalStream(engine).open(), {"env": pool}, {"env": limits}, TOKENIZER, ChatFormat(), SAMPLING
        )
        client.submit([EpisodeRequest(key, (1,), "env", row, key, seed=100 + key) for key in range(NUM_EPISODES)])
        while client.outstanding:
            finished |= dict(client.poll(60.0))
    return [finished[key] for key in range(NUM_EPISODES)]


def assert_exact(trained: TrainStrategy, episodes: list[Completion]) -> None:
    """Check the log-probs of sampled tokens, and that given tokens lie between them."""
    played = [completion.episode for completion in episodes if completion.episode is not None]
    assert [episode.failed for episode in played] == [None] * NUM_EPISODES
    assert {len(episode.turns) for episode in played} == {NUM_TURNS}
    for episode in played:
        assert [value for value, _ in groupby(episode.mask)] == [True, False] * (NUM_TURNS - 1) + [True]
    prompts = [Prompt(episode.prompt_ids, episode.prompt_text, {}) for episode in played]
    rollouts = Rollouts.collate(prompts, [[completion] for completion in episodes], pad=0, weights_version=0)
    mask = rollouts.sequences.response_mask
    assert mask.sum() >= NUM_EPISODES * NUM_TURNS
    scores = trained.score(rollouts.sequences)
    torch.testing.assert_close(scores.log_probs[mask], rollouts.rollout_log_probs[mask], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def played(folders: dict[str, Path]) -> Callable[[str], list[Completion]]:
    """Return the episodes of an environment, which are played once."""
    found: dict[str, list[Completion]] = {}

    def get(environment: str) -> list[Completion]:
        if environment not in found:
            found[environment] = play(HfInfer(setup_of(folder_of(folders, environment)), HfConfig()), environment)
        return found[environment]

    return get


def folder_of(folders: dict[str, Path], environment: str) -> Path:
    return folders["calling" if environment == "tool_use" else "random"]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("environment", ARGUMENTS)
def test_trainer_computes_the_log_probs_of_the_engine(
    played: Callable[[str], list[Completion]], folders: dict[str, Path], environment: str, kind: str
) -> None:
    assert_exact(trainer(kind, folder_of(folders, environment)), played(environment))


def test_tools_were_called(played: Callable[[str], list[Completion]]) -> None:
    for completion in played("tool_use"):
        assert completion.episode is not None
        assert [turn.messages[0]["content"] for turn in completion.episode.turns] == ["408"] * NUM_TURNS


@pytest.fixture
def vllm(folders: dict[str, Path]) -> Iterator[StreamingStrategy]:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = VllmConfig(max_num_seqs=NUM_EPISODES, kv_cache_memory_mb=64, load_format="auto")
    engine = VllmGenerate(setup_of(folders["random"]), config, max_model_len=2000)
    yield engine
    engine.shutdown()


@pytest.mark.vllm
def test_trainer_computes_the_log_probs_of_vllm(vllm: StreamingStrategy, folders: dict[str, Path]) -> None:
    assert_exact(trainer("hf", folders["random"]), play(vllm, "frozen_lake"))
