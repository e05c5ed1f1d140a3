"""The user's program of one episode: environment, row, output, end."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roll_gspo.config.agent import AgentConfig
from roll_gspo.errors import ConfigError
from roll_gspo.workers.process import kill_group
from roll_gspo.workers.supervise import supervised

_KEPT_BYTES = 64 * 1024
_CHUNK = 1 << 16
_MAX_READS = 16
_ERROR_LINES, _MAX_ERROR_CHARS = 20, 3000
# What programs need to start. Anything else, e.g. a token of a service, is named in `agent.forward_env`.
_FORWARDED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONPATH", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)


@dataclass(frozen=True)
class AgentCommand:
    """The user's program and its limits.

    Attributes:
        arguments: the program and its arguments.
        env: environment variables to set.
        forward_env: names of variables of this process that the program receives.
        max_memory_mb: MiB that each of its processes may allocate; None for no limit.
    """

    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    forward_env: Sequence[str] = ()
    max_memory_mb: int | None = None

    @staticmethod
    def of(config: AgentConfig) -> AgentCommand:
        """Return the program of the block `agent`."""
        return AgentCommand(config.arguments, config.env, config.forward_env, config.max_memory_mb)

    def check(self) -> None:
        """Check that the program exists.

        Raises:
            ConfigError: it does not, or cannot be executed.
        """
        if shutil.which(self.arguments[0], path=_search_path()) is None:
            raise ConfigError(
                f"agent.command: '{self.arguments[0]}' is no program that can be executed; correct the name, or write "
                "its interpreter first"
            )

    def variables(self) -> dict[str, str]:
        """Return the environment of the program, without that of the episode."""
        names = (*_FORWARDED, *self.forward_env)
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, "PATH": _search_path(), "NO_PROXY": "127.0.0.1,localhost", **self.env}


class AgentProgram:
    """A running program.

    Args:
        command: the program.
        base_url, api_key: the endpoint, and the key of the episode.
        row: columns of the data row; the program reads them from a JSON file.
        seed: seed of the row.
    """

    def __init__(self, command: AgentCommand, base_url: str, api_key: str, row: Mapping[str, Any], seed: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="roll_gspo_agent_", ignore_cleanup_errors=True)
        file = Path(self._folder.name, "row.json")
        file.write_text(json.dumps(dict(row), default=str), encoding="utf-8")
        own = {
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": api_key,
            "ROLL_GSPO_ROW": str(file),
            "ROLL_GSPO_SEED": str(seed),
            "TMPDIR": self._folder.name,
        }
        self._process = subprocess.Popen(
            supervised(command.arguments, command.max_memory_mb),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a process group that can be killed as a whole and does not receive Ctrl-C
            env=command.variables() | own,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._output = _Tail(self._process.stdout.fileno())
        self._errors = _Tail(self._process.stderr.fileno())

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Read what the program has printed; return its exit code, or None while it runs.

        The code is 128 plus the number of a signal that ended it, and 127 if it could not be started.
        """
        code = self._process.poll()
        self._output.read()
        self._errors.read()
        return code

    def printed_reward(self) -> float | None:
        """Return the reward in the last line of the output, if that is JSON such as `{"reward": 1.0}`."""
        lines = self._output.text().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        try:
            value = json.loads(last)
        except ValueError:
            return None
        reward = value.get("reward") if isinstance(value, dict) else None
        return float(reward) if isinstance(reward, int | float) and math.isfinite(reward) else None

    def last_errors(self) -> str:
        """Return the last lines that the program wrote to stderr."""
        return "\n".join(self._errors.text().splitlines()[-_ERROR_LINES:])[-_MAX_ERROR_CHARS:]

    def kill(self) -> None:
        """Kill the program and what it started, and remove its files."""
        kill_group(self._process)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._folder.cleanup()


class _Tail:
    """The last bytes of a pipe, which is read without waiting."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = b""
        os.set_blocking(descriptor, False)

    def read(self) -> None:
        """Read what is there. A program that prints without end waits until the next call."""
        for _ in range(_MAX_READS):
            try:
                data = os.read(self._descriptor, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                return
            self._bytes = (self._bytes + data)[-_KEPT_BYTES:]

    def text(self) -> str:
        """Return what was kept."""
        return self._bytes.decode("utf-8", "replace")


def _search_path() -> str:
    """Return `PATH` with the folder of the running interpreter first, so that `python` is this one."""
    return os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
