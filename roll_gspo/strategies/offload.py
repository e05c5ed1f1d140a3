"""Moves the state of an engine between its device and host memory, in place.

The memory behind the tensors is freed and allocated again. Tensor objects and views of them stay valid, so modules,
optimizers and buffers keep their references. Between the two moves their values must not be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from roll_gspo.errors import ResidencyError
from roll_gspo.strategies.residency import Residency

# torch rounds pinned memory up to a power of two, which would waste up to half of one large allocation.
CHUNK_BYTES = 256 << 20


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Return the memory of a tensor, which it may share with others."""
    return tensor.untyped_storage()


class Part:
    """A part of an engine's state that moves as a whole.

    Args:
        tensors: returns the tensors of the part; it may return others after an update or a load.
        content: `values` copies the values to the host in every move. `constant` does so once, until `changed`.
            `zeros` drops them; the tensors are 0 when they return.
    """

    def __init__(
        self, tensors: Callable[[], Iterable[Tensor]], content: Literal["values", "constant", "zeros"] = "values"
    ) -> None:
        self._tensors = tensors
        self._content = content
        self._chunks: list[Tensor] = []
        self._is_copied = False
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    def changed(self) -> None:
        """Note that the values of a `constant` part have changed."""
        self._is_copied = False

    @torch.no_grad()
    def leave(self) -> None:
        """Free the device memory. If there is no host memory for the values, nothing has changed."""
        tensors = list(self._tensors())
        for tensor in tensors:
            if not storage_of(tensor).resizable():  # memory of a file, which torch cannot free
                tensor.data = tensor.data.clone()
        away = [(storage, storage.nbytes()) for storage in _distinct(tensors)]
        if self._content != "zeros" and not self._is_copied:
            self._reserve(sum(size for _, size in away), pinned=any(s.device.type == "cuda" for s, _ in away))
            for host, device in self._pieces(away):
                host.copy_(device, non_blocking=True)
            _wait_for_copies()
            self._is_copied = self._content == "constant"
        for storage, _ in away:
            storage.resize_(0)
        self._away = away

    @torch.no_grad()
    def come_back(self) -> None:
        """Allocate the device memory and restore the values. If there is not enough memory, nothing has changed."""
        try:
            for storage, size in self._away:
                storage.resize_(size)
        except RuntimeError:
            for storage, _ in self._away:
                storage.resize_(0)
            raise
        if self._content == "zeros":
            for storage, _ in self._away:
                _bytes_of(storage).zero_()
        else:
            for host, device in self._pieces(self._away):
                device.copy_(host, non_blocking=True)
            _wait_for_copies()
        self._away = []

    def _reserve(self, size: int, pinned: bool) -> None:
        """Allocate host memory for `size` bytes, unless it exists."""
        if sum(len(chunk) for chunk in self._chunks) == size:
            return
        self._chunks = []
        sizes = [min(CHUNK_BYTES, size - start) for start in range(0, size, CHUNK_BYTES)]
        self._chunks = [torch.empty(length, dtype=torch.uint8, pin_memory=pinned) for length in sizes]

    def _pieces(self, away: Sequence[tuple[torch.UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (host memory, device memory) of equal sizes. They cover every storage."""
        position = 0
        for storage, size in away:
            flat, start = _bytes_of(storage), 0
            while start < size:
                chunk, offset = self._chunks[position // CHUNK_BYTES], position % CHUNK_BYTES
                length = min(size - start, len(chunk) - offset)
                yield chunk[offset : offset + length], flat[start : start + length]
                start, position = start + length, position + length


class EngineState:
    """The state of an engine: its weights, and parts that only training needs.

    Args:
        engine: name of the engine, for messages.
        weights: the weights.
        training: gradients and optimizer state.
        before_leaving: called before anything leaves the device.
    """

    def __init__(
        self,
        engine: str,
        weights: Part,
        training: Sequence[Part] = (),
        before_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._before_leaving = before_leaving
        self._parts = [(Residency.WEIGHTS, weights), *((Residency.FULL, part) for part in training)]
        self._residency = Residency.FULL
        self._present = [True] * len(self._parts)

    @property
    def residency(self) -> Residency:
        """Largest residency whose parts are all on the device."""
        missing = [part for (part, _), present in zip(self._parts, self._present, strict=True) if not present]
        return Residency(min(missing) - 1) if missing else self._residency

    def reside(self, residency: Residency) -> None:
        """Move the parts that are on the wrong side; those of training leave first and return last.

        Raises:
            ResidencyError: device or host memory is exhausted; parts that had moved stay where they are.
        """
        if residency < self.residency:
            self._before_leaving()
        try:
            for number in reversed(range(len(self._parts))):
                needed, part = self._parts[number]
                if needed > residency and self._present[number]:
                    part.leave()
                    self._present[number] = False
            for number, (needed, part) in enumerate(self._parts):
                if needed <= residency and not self._present[number]:
                    part.come_back()
                    self._present[number] = True
        except RuntimeError as error:
            raise ResidencyError(
                f"{self._engine}: its state cannot be moved from {self.residency.name} to {residency.name} ({error}); "
                "use more devices, or free memory of the device or of the host"
            ) from error
        self._residency = residency
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes cannot use memory that torch keeps

    def need(self, least: Residency, work: str) -> None:
        """Check that an engine can do `work`.

        Raises:
            ResidencyError: the state that the work needs is offloaded.
        """
        require(self.residency, least, self._engine, work)


class Offloadable:
    """Base of an engine with an `EngineState`, which implements `OffloadableEngine`."""

    _state: EngineState

    @property
    def residency(self) -> Residency:
        """Part of the state that is in device memory."""
        return self._state.residency

    def reside(self, residency: Residency) -> None:
        """Move state until exactly the part `residency` is in device memory; see `OffloadableEngine.reside`."""
        self._state.reside(residency)


def require(residency: Residency, least: Residency, engine: str, work: str) -> None:
    """Check the residency that a work needs.

    Raises:
        ResidencyError: it is lower than `least`.
    """
    if residency < least:
        raise ResidencyError(
            f"{engine}: cannot {work} while its state is offloaded (it is at {residency.name}, {work} needs "
            f"{least.name}); call reside, or SharedDevices.enter, before"
        )


def outside(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that share no memory with `others`, without scalars, which AdamW keeps on the host."""
    taken = {storage_of(tensor)._cdata for tensor in others}
    return [tensor for tensor in tensors if tensor.dim() and storage_of(tensor)._cdata not in taken]


def _distinct(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of tensors in order, each once and without empty ones."""
    found = {}
    for tensor in tensors:
        storage = storage_of(tensor)
        if storage.nbytes():
            found.setdefault(storage._cdata, storage)
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
