"""The rendezvous address of a weight broadcast."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from typing import Literal

Backend = Literal["gloo", "nccl", "ipc"]


@dataclass(frozen=True)
class WeightBroadcastAddress:
    """The rendezvous address of a weight broadcast.

    Attributes:
        host, port: address of the sender's store. With port 0 the sender chooses a free port, which
            `WeightBroadcastSender.address` then contains.
        world_size: number of members: the sender (rank 0) and all receivers.
        secret: prefix of the keys in the store; chosen by the sender.
        first_rank: rank of the receiver that gets this address, or of the first worker of its engine.
        timeout_s: time limit of every wait for another member.
        backend: transport of the bytes: `gloo` through host memory, vLLM's `nccl` or `ipc` between GPUs.
        num_trainers: ranks of the trainer, of which rank 0 sends.
        workers_per_engine: consecutive ranks that belong to one engine.
    """

    host: str
    port: int
    world_size: int
    secret: str = ""
    first_rank: int = 1
    timeout_s: float = 300.0
    backend: Backend = "gloo"
    num_trainers: int = 1
    workers_per_engine: int = 1

    def at(self, first_rank: int) -> WeightBroadcastAddress:
        """Return the address for the receiver with rank `first_rank`."""
        return replace(self, first_rank=first_rank)

    def own_ip(self) -> str:
        """Return the IP of the local interface that routes to the sender; sends no packet."""
        family, kind, _, _, target = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
