"""Self-test of collectives: processes on the devices of this machine sum a tensor, and share memory of GPUs.

The module is also the program of one process: `python -m roll_gspo.doctor.communication RANK SIZE FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from roll_gspo.doctor.findings import Findings, error, ok

TIMEOUT_S = 120.0
_GRACE_S = 5.0  # for the errors of other processes that explain the first one
_NUM_ELEMENTS = 1 << 20


def communication_findings(num_gpus: int) -> Findings:
    """Run the self-test with one process per GPU, or with two processes without GPUs."""
    on_cuda, size = num_gpus > 0, num_gpus or 2
    what = f"NCCL and CUDA IPC between {size} GPU(s)" if on_cuda else "gloo between 2 processes"
    started = time.monotonic()
    problems = run_processes(size)
    if not problems:
        yield ok(f"{what}: sums are right, {time.monotonic() - started:.0f} s with imports")
    for rank, reason in problems.items():
        fix = "rerun with NCCL_DEBUG=INFO, check nvidia-smi topo -m" if on_cuda else "check the host name and firewalls"
        yield error(f"{what}: process {rank} failed ({reason}); {fix}")


def run_processes(
    size: int, timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Run the program in `size` processes; return the reason of every one that failed or was late, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(path for path in sys.path if path)
        variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", __name__]
        processes = []
        for rank in range(size):
            with open(Path(folder) / f"{rank}.err", "w") as log:
                arguments = [*command, str(rank), str(size), folder, str(timeout_s)]
                processes.append(subprocess.Popen(arguments, env=variables, stdout=log, stderr=log))
        try:
            _wait(processes, timeout_s)
            late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        reasons = dict.fromkeys(late, f"not done within {timeout_s:g} s")
        for rank, process in enumerate(processes):
            if rank not in late and process.returncode:
                lines = (Path(folder) / f"{rank}.err").read_text(errors="replace").strip().splitlines()
                reasons[rank] = lines[-1] if lines else f"exit status {process.returncode}"
        if len(reasons) > len(late):  # the others wait for those that failed
            reasons = {rank: reason for rank, reason in reasons.items() if rank not in late}
        return reasons


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until all processes end, or a short time after the first one fails."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            until = min(until, time.monotonic() + _GRACE_S)
        time.sleep(0.05)


def main(rank: int, size: int, folder: str, timeout_s: float) -> None:
    """Run one process of the self-test."""
    import torch
    from torch import distributed as dist
    from torch._C._distributed_c10d import FileStore  # not exported by torch.distributed

    from roll_gspo.rendezvous import group_backend, use_interface_of

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(rank)
    use_interface_of("127.0.0.1")
    store = FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group(
        group_backend(), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    expected = float(sum(range(size)))
    for device in ("cpu", "cuda") if on_cuda else ("cpu",):
        tensor = torch.full((_NUM_ELEMENTS,), float(rank), device=device)
        dist.all_reduce(tensor)
        if not bool((tensor == expected).all()):
            raise RuntimeError(
                f"the sum of {device} tensors over {size} processes is wrong: {tensor[0]}, not {expected}"
            )
    if on_cuda:
        _share_memory(rank, size)
    dist.destroy_process_group()


def _share_memory(rank: int, size: int) -> None:
    """Read the memory of the previous rank's GPU through CUDA IPC, as the weight transfer `ipc` does."""
    import torch
    from torch import distributed as dist
    from torch.multiprocessing.reductions import reduce_tensor

    own = torch.full((_NUM_ELEMENTS,), float(rank), device="cuda")
    torch.cuda.synchronize()
    handles: list[object] = [None] * size
    dist.all_gather_object(handles, reduce_tensor(own))
    before = (rank - 1) % size
    if before != rank:
        rebuild, arguments = handles[before]  # type: ignore[misc]
        shared = rebuild(*arguments)
        if not bool((shared == float(before)).all()):
            raise RuntimeError(f"memory of GPU {before} is wrong through CUDA IPC: {shared[0]}, not {before}")
    dist.barrier()  # `own` must live until it has been read


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
