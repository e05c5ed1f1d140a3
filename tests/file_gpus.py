"""GPUs made of gloo and of files, for vLLM's weight transfers: both sides run their real code on a CPU.

`install` replaces NCCL by gloo, and the shared memory of CUDA IPC by mapped files. Streams do nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode


class FileCommunicator:
    """An NCCL communicator made of gloo. Its unique ID is the path of a file where the ranks meet."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: object) -> None:
        store = dist.FileStore(unique_id.rstrip(b"\0").decode(), world_size)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._group = dist.ProcessGroupGloo(store, rank, world_size, options)
        self.aborted = False

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        work = self._group.broadcast([tensor], options)
        while not self.aborted and not work.is_completed():
            time.sleep(0.001)

    def destroy(self) -> None:
        self.aborted = True


class _Library:
    def ncclGetUniqueId(self) -> SimpleNamespace:
        path = Path(tempfile.mkdtemp(), "id")
        return SimpleNamespace(internal=str(path).encode().ljust(128, b"\0"))


class _OnFiles(TorchFunctionMode):
    """`torch.empty(..., device="cuda")` is memory of a file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") == "cuda":
            assert kwargs["dtype"] == torch.uint8
            path = Path(tempfile.mkdtemp(), "memory")
            made = torch.from_file(str(path), shared=True, size=args[0], dtype=torch.uint8)
            _paths[made.data_ptr()] = str(path)
            return made
        return func(*args, **kwargs)


_paths: dict[int, str] = {}


def _reduce(tensor: Tensor) -> tuple[object, tuple[object, ...]]:
    """The arguments that torch gives for a CUDA tensor; the handle is a path."""
    handle = _paths[tensor.data_ptr()].encode()
    shape = tensor.size(), tensor.stride(), 0
    counters = b"counter", 0, b"event", True
    storage = torch.storage.TypedStorage, torch.uint8, 0, handle, tensor.nbytes, 0
    return None, (torch.Tensor, *shape, *storage, False, *counters)


def _rebuild(*arguments: Any) -> Tensor:
    cls, size, stride, offset, storage, dtype, _, handle, nbytes, *_ = arguments
    assert (cls, storage, dtype, stride, offset) == (torch.Tensor, torch.storage.TypedStorage, torch.uint8, (1,), 0)
    return torch.from_file(handle.decode(), shared=True, size=nbytes, dtype=dtype).view(size)


def install(patch: Any, gpu: int = 0) -> None:
    """Replace what needs CUDA in a process on one GPU; `patch(owner, name, value)` sets an attribute."""
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor

    from roll_gspo.strategies.vllm.engine import native_sender

    stream = SimpleNamespace(synchronize=lambda: None)
    patch(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    patch(packed_tensor, "reduce_tensor", _reduce)
    patch(reductions, "rebuild_cuda_tensor", _rebuild)
    patch(torch.accelerator, "current_device_index", lambda: 0)
    patch(torch.accelerator, "synchronize", lambda: None)
    patch(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(uuid=f"GPU-{gpu}"))
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(torch.cuda, "current_stream", lambda: stream)
    patch(torch.cuda, "synchronize", lambda: None)
    patch(torch.cuda, "ipc_collect", lambda: None)
    patch(nccl_common, "uid_init_process_group", FileCommunicator)
    patch(native_sender, "uid_init_process_group", FileCommunicator)
    patch(native_sender, "NCCLLibrary", _Library)
    produce = ipc_engine.packed_ipc_producer

    def on_files(*args: Any, **kwargs: Any) -> Iterator[Any]:
        chunks = produce(*args, **kwargs)
        while True:
            with _OnFiles():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    patch(ipc_engine, "packed_ipc_producer", on_files)
