"""Where the members of a wire meet."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WeightBroadcastAddress:
    """Where the members of a wire meet.

    Attributes:
        host, port: of the sender's store, as the receivers reach it; port 0 lets the sender choose a free one
            (`WeightBroadcastSender.address` then has it).
        world_size: members: the sender, which is rank 0, and every receiver.
        first_rank: of the receiver that gets this address, or of the first worker of an engine that has several.
        timeout_s: how long a member waits for another one at any point.
    """

    host: str
    port: int
    world_size: int
    first_rank: int = 1
    timeout_s: float = 300.0

    def at(self, first_rank: int) -> WeightBroadcastAddress:
        """The same wire for another receiver."""
        return replace(self, first_rank=first_rank)

    def own_ip(self) -> str:
        """Of this machine's interface that leads to the sender; nothing is sent to find it out."""
        family, kind, _, _, target = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
