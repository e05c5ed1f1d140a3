"""Idle time of the engine and CPU time of the controller while many episodes wait for slow tools.

    python benchmarks/episodes.py [--engine hf|vllm] [--concurrent 256] [--episodes 768] [--turns 3] [--longest 2]

One engine in a worker process plays `builtin:tiny_qwen3` with random weights. A tool takes 0 to `--longest` seconds per
turn, uniformly, in two processes with a thread per episode. As soon as an episode ends, another one begins. The numbers
are those of the time in which `--concurrent` episodes are outstanding. The first row has tools that take no time.

* engine idle: share of the time in which the engine computes nothing.
* controller: CPU seconds per second of the thread that polls, and of its process (with the threads of Ray and of the
  pool of environments).
* hidden: share of the tools' time during which the engine samples other answers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.pool import EnvironmentPool
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.execution.base import Devices, ExecutionSettings
from roll_gspo.execution.ray.executor import RayExecutor
from roll_gspo.execution.ray.group import RayGroup
from roll_gspo.models.tiny import TINY_MODELS, build_model, byte_tokenizer
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits, EpisodeRequest
from roll_gspo.roles.replica import Advanced, Replica
from roll_gspo.roles.replicas import Replicas
from roll_gspo.strategies.base import ModelSetup, Sampling

LONGEST = 1000  # tokens of an episode


class MeasuredReplica(Replica):
    """A replica that measures the time in which its engine computes."""

    _busy_s = 0.0

    def advance(self, seconds: float, report: bool = False) -> Advanced:
        """Decode; see `Replica.advance`."""
        has_requests, started = bool(self._reported), time.perf_counter()
        advanced = super().advance(seconds, report)
        self._busy_s += time.perf_counter() - started if has_requests else 0.0
        return advanced

    def busy_seconds(self) -> float:
        """Return the seconds in which the engine has computed."""
        return self._busy_s


def make_replica(engine: str, checkpoint: Path, capacity: int) -> MeasuredReplica:
    """Build a worker."""
    setup = ModelSetup(checkpoint, torch.float32, 1, 1.0, 0)
    if engine == "hf":
        from roll_gspo.strategies.hf.config import HfConfig
        from roll_gspo.strategies.hf.infer import HfInfer

        return MeasuredReplica(HfInfer(setup, HfConfig(generate_batch_size=capacity)))
    from roll_gspo.strategies.vllm.config import VllmConfig
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    config = VllmConfig(max_num_seqs=capacity, load_format="auto", kv_cache_memory_mb=512)
    return MeasuredReplica(VllmGenerate(setup, config, LONGEST, receives_broadcast=True))


class Measured(NamedTuple):
    """Results of a row."""

    turns_per_s: float
    idle: float
    thread_cpu: float
    process_cpu: float
    hidden: float


def play(group: RayGroup, arguments: argparse.Namespace, longest_s: float) -> Measured:
    """Play episodes; measure while `concurrent` of them are outstanding."""
    tokenizer = byte_tokenizer()
    limits = EpisodeLimits(arguments.turns, 100, LONGEST - 100, arguments.tokens, 600.0)
    spec = EnvironmentSpec("slow_tool.SlowTool", {"longest_s": longest_s, "num_turns": arguments.turns})
    with EnvironmentPool(spec, 2, arguments.concurrent, 60.0, "custom_envs.tool") as pool:
        pool.check({}, 60.0)
        client = EpisodeClient(
            *(Replicas(group, 0).stream.open(), {"tool": pool}, {"tool": limits}, tokenizer, ChatFormat()),
            Sampling(1, arguments.tokens),
        )
        requests = [EpisodeRequest(key, (1,), "tool", {}, key, seed=key) for key in range(arguments.episodes)]
        started, busy_s = time.perf_counter(), group.call("busy_seconds")
        thread_s, process_s = time.thread_time(), time.process_time()
        client.submit(requests[: arguments.concurrent])
        begun = arguments.concurrent
        num_turns = 0
        while begun < len(requests):
            finished = client.poll(1.0)
            num_turns += sum(len(done.completion.episode.turns) for done in finished if done.completion.episode)
            client.submit(requests[begun : begun + len(finished)])
            begun += len(finished)
        seconds = time.perf_counter() - started
        thread_s, process_s = time.thread_time() - thread_s, time.process_time() - process_s
        played = client.time
        client.close()
        busy_s = group.call("busy_seconds") - busy_s
    hidden = played.hidden_s / played.total_s if played.total_s else 0.0
    return Measured(num_turns / seconds, 1 - busy_s / seconds, thread_s / seconds, process_s / seconds, hidden)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="vllm")
    parser.add_argument("--concurrent", type=int, default=256)
    parser.add_argument("--episodes", type=int, default=768)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="largest number of tokens per answer")
    parser.add_argument("--longest", type=float, default=2.0, help="largest time of a tool in seconds")
    arguments = parser.parse_args()
    executor = RayExecutor(ExecutionSettings(devices=(0,), devices_per_node=1))
    with tempfile.TemporaryDirectory() as folder:
        build_model(TINY_MODELS["tiny_qwen3"], seed=1).save_pretrained(folder)
        make = partial(make_replica, arguments.engine, Path(folder), arguments.concurrent)
        group = executor.start_group("actor_infer", make, Devices((0,), 1, 1), one_world=False)
        print("| tools | turns per s | engine idle | controller thread, CPU s per s | its process | hidden |")
        print("|---|---|---|---|---|---|")
        for longest_s in (0.0, arguments.longest):
            found = play(group, arguments, longest_s)
            print(
                f"| 0-{longest_s:g} s | {found.turns_per_s:.0f} | {found.idle:.0%} | {found.thread_cpu:.2f} | "
                f"{found.process_cpu:.2f} | {found.hidden:.0%} |",
                flush=True,
            )
        group.close()
    executor.close()


if __name__ == "__main__":
    main()
