"""Residency of a vLLM engine: its sleep mode.

At level 2 vLLM frees weights and KV cache without a copy, because the trainer sends new weights before the next
response. Waking the weights allocates their memory and leaves it undefined. At level 1 vLLM copies the weights to host
memory and back. This is for an engine with the weights of the checkpoint, whose trainer sends adapters.

Outstanding requests are kept: they wait in the scheduler, and their KV cache is computed again.
"""

from __future__ import annotations

from typing import Any, Protocol

from roll_gspo.errors import ResidencyError
from roll_gspo.strategies.offload import require
from roll_gspo.strategies.residency import Residency


def sleep_args(shares_devices: bool) -> dict[str, object]:
    """Return the arguments of an engine that leaves its devices."""
    return {"enable_sleep_mode": True} if shares_devices else {}


class SleepingLLM(Protocol):
    """The methods of `vllm.LLM` that move memory. `wake_up` returns whether everything is awake."""

    def sleep(self, level: int = 1, mode: Any = "abort") -> None: ...

    def wake_up(self, tags: list[str] | None = None) -> bool: ...

    def reset_prefix_cache(self) -> bool: ...


class SleepMode:
    """Moves one engine between the residencies.

    Args:
        llm: the engine.
        enabled: the engine was built with `enable_sleep_mode`.
        keeps_weights: weights and adapters survive a sleep; otherwise they are undefined after it.

    Attributes:
        residency: part of the engine that is in device memory.
        keeps_weights: as above.
    """

    def __init__(self, llm: SleepingLLM, enabled: bool, keeps_weights: bool = False) -> None:
        self._llm = llm
        self._enabled = enabled
        self.keeps_weights = keeps_weights
        self.residency = Residency.FULL

    def reside(self, residency: Residency) -> None:
        """Sleep, or wake in the order of `Residency`. A smaller residency frees everything first.

        Raises:
            ResidencyError: the engine has no sleep mode, or vLLM failed; `residency` is what was reached.
        """
        if residency == self.residency:
            return
        if not self._enabled:
            raise ResidencyError(
                "vllm: the engine was built without sleep mode, so it cannot leave its device; vLLM has one on GPUs, "
                "with offload_states on"
            )
        try:
            if residency < self.residency:
                self._llm.sleep(level=1 if self.keeps_weights else 2, mode="keep")
                self.residency = Residency.OFFLOADED
            if residency >= Residency.WEIGHTS and self.residency == Residency.OFFLOADED:
                self._llm.wake_up(["weights"])
                self.residency = Residency.WEIGHTS
            if residency == Residency.FULL:
                self._wake_cache()
        except ResidencyError:
            raise
        except Exception as error:  # CUDA and assertion errors of vLLM
            raise ResidencyError(
                f"vllm: the engine cannot move from {self.residency.name} to {residency.name} ({type(error).__name__}: "
                f"{error}); lower gpu_memory_utilization, or free memory of the device"
            ) from error

    def require(self, least: Residency, work: str) -> None:
        """Check that the engine can do `work`.

        Raises:
            ResidencyError: the memory that the work needs is freed.
        """
        require(self.residency, least, "vllm", work)

    def _wake_cache(self) -> None:
        awake = self._llm.wake_up(["kv_cache"])
        if not awake:
            raise ResidencyError("vllm: parts of the engine are asleep after it was woken; restart the run")
        self.residency = Residency.FULL
        self._llm.reset_prefix_cache()
