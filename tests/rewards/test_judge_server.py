"""Judge servers: processes with a stand-in server, and with vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.models.tiny import TINY_MODELS, build_model, byte_tokenizer, save
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.llm_judge import server as server_module
from roll_gspo.rewards.llm_judge.server import BASE_URL, JudgeEngine, JudgeServer, JudgeServers
from roll_gspo.rewards.spec import CompositionSpec
from roll_gspo.roles.reward_manager import RewardManager

KEY = "rewards.x.worker_args.engine"
# Replaces vLLM. It starts a child process and serves `/health` on the socket.
STAND_IN = """
import http.server, os, socketserver, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def address_string(self):
        return "socket"
print("child", child.pid, "VLLM_ENABLE_V1_MULTIPROCESSING" in os.environ, flush=True)
socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


def wait_until(condition: Callable[[], bool], failure: str) -> None:
    """Poll a condition for up to 60 s."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{failure} after 60 s"
        time.sleep(0.05)


def is_gone(group: int) -> bool:
    """Return whether a process group has no processes except zombies."""
    states = [line.split()[1] for line in processes() if line.split()[0] == str(group)]
    return not [state for state in states if not state.startswith("Z")]


def processes() -> list[str]:
    """Return `group state` of every process."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, timeout=60, check=True)
    return listed.stdout.splitlines()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """Return a server that runs the stand-in."""
    monkeypatch.setattr(server_module, "_COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    server = JudgeServer(JudgeEngine("m"), KEY)
    yield server
    server.close()


def group_of(server: JudgeServer) -> int:
    """Return the process group of a running server."""
    assert server.pid is not None
    return server.pid


def test_server_is_started_once_restarted_after_death_and_killed(server: JudgeServer) -> None:
    server.start()
    first, socket = group_of(server), Path(server.socket)
    server.start()
    assert group_of(server) == first and socket.is_socket()
    assert "False" in (socket.parent / "log").read_text(), "vLLM variables of the run are not inherited"
    os.killpg(first, signal.SIGKILL)
    wait_until(lambda: is_gone(first), "the first server is still running")
    wait_until(lambda: server._process is not None and server._process.poll() is not None, "poll() reports no exit")
    server.start()
    second = group_of(server)
    assert second != first and server.socket == str(socket)
    server.close()
    wait_until(lambda: is_gone(second), "the second server is still running")
    assert not socket.parent.exists()
    server.close()


def test_server_that_dies_or_is_not_ready_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        server_module, "_COMMAND", (sys.executable, "-c", "print('out of memory'); raise SystemExit(3)")
    )
    server = JudgeServer(JudgeEngine("my/model"), KEY)
    with pytest.raises(RewardError, match=r"(?s)^rewards\.x.*my/model.*out of memory"):
        server.start()
    monkeypatch.setattr(server_module, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    server = JudgeServer(JudgeEngine("my/model", start_timeout_s=0.5), KEY)
    with pytest.raises(RewardError, match=r"start_timeout_s 0\.5"):
        server.start()
    assert server.pid is None


def test_server_ends_with_its_owner(tmp_path: Path) -> None:
    program = f"""
import sys
from roll_gspo.rewards.llm_judge import server
server._COMMAND = (sys.executable, "-c", {STAND_IN!r})
judge = server.JudgeServer(server.JudgeEngine("m"), "x")
judge.start()
print(judge.pid, judge.socket, flush=True)
sys.stdin.read()
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, socket = owner.stdout.readline().split()
    assert not is_gone(int(pid))
    owner.kill()
    owner.wait(timeout=60)
    wait_until(lambda: is_gone(int(pid)) and not Path(socket).parent.exists(), "the server is still running")


@pytest.mark.parametrize(
    ("engine", "match"),
    [
        ({}, r"^engine: .*model.*{}"),
        ({"model": "m", "max_model_length": 5}, r"^engine\.max_model_length: .*'max_model_len'"),
        ({"model": "m", "devices": "0"}, r"^engine\.devices: .*int.*'0'"),
        ({"model": "m", "start_timeout_s": None}, r"^engine\.start_timeout_s: .*None"),
        ({"model": "m", "start_timeout_s": 0}, r"^engine\.start_timeout_s: .*0"),
        ({"model": "m", "dtype": 16}, r"^engine\.dtype: .*16"),
    ],
)
def test_invalid_engine_raises(engine: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        JudgeEngine.from_config(engine, "engine")


def test_equal_engines_share_a_server() -> None:
    def judge(**arguments: Any) -> dict[str, Any]:
        return {"worker_cls": "llm_judge", "worker_args": {"engine": {"model": "m", "devices": [0]}, **arguments}}

    servers = JudgeServers()
    parts = {"cheap": {"worker_cls": "exact_match"}, "judge": judge(parser="yes_no")}
    both = RewardConfig.model_validate({"combine": "gate", "parts": parts})
    spec = servers.resolve(spec_from_config(both, "rewards.a"), "rewards.a")
    alone = servers.resolve(spec_from_config(RewardConfig.model_validate(judge()), "rewards.b"), "rewards.b")
    assert isinstance(spec, CompositionSpec)
    arguments = spec.parts["judge"].reward.arguments
    assert arguments == {"parser": "yes_no", **alone.arguments}
    assert (arguments["base_url"], arguments["model"]) == (BASE_URL, "m") and "engine" not in arguments
    servers.close()
    block = RewardConfig.model_validate(judge(base_url="http://host/v1"))
    with pytest.raises(ConfigError, match=r"^rewards\.c\.worker_args\.engine: .*base_url"):
        servers.resolve(spec_from_config(block, "rewards.c"), "rewards.c")


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_server_scores_and_is_killed(tmp_path: Path) -> None:
    save(build_model(TINY_MODELS["tiny_qwen3"], 0), byte_tokenizer(), tmp_path / "model")
    engine = {"model": str(tmp_path / "model"), "max_model_len": 4096, "arguments": ["--enforce-eager"]}
    extra_body = {"structured_outputs": {"choice": ["Verdict: yes", "Verdict: no"]}}  # the model is untrained
    arguments = {"engine": engine, "parser": "yes_no", "extra_body": extra_body, "cache_dir": str(tmp_path / "cache")}
    parts = {
        "boxed": {"worker_cls": "exact_match"},
        "judge": {"worker_cls": "llm_judge", "worker_args": arguments, "weight": 0.5},
    }
    manager = RewardManager({"x": RewardConfig.model_validate({"combine": "gate", "parts": parts, "else_score": -1.0})})
    prompts = [Prompt((1,), "2+2=", {"id": str(i), "ground_truth": "4", "domain": "x", "tag": ""}) for i in range(3)]
    rollouts = Rollouts.collate(prompts, [[Completion((5,), (-1.0,), "stop")]] * 3, pad=0, weights_version=0)
    try:
        manager.check(prompt.row for prompt in prompts)
        (server,) = manager._servers._servers.values()
        group = group_of(server)
        results = manager.score(rollouts, ["so: 4", "so: 5", "surely: 4"])
    finally:
        manager.close()
    assert [r.failed for r in results] == [None] * 3
    assert [set(r.components) for r in results] == [{"boxed", "judge"}, {"boxed"}, {"boxed", "judge"}]
    assert results[1].score == -1.0
    assert all(r.score == 0.5 * r.components["judge"] and r.components["judge"] in (0, 1) for r in results[::2])
    wait_until(lambda: is_gone(group), "vLLM is still running")


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_without_model_raises_with_its_log(tmp_path: Path) -> None:
    server = JudgeServer(JudgeEngine(str(tmp_path / "absent")), KEY)
    with pytest.raises(RewardError, match=r"(?s)it died.*\n.*absent"):
        server.start()
