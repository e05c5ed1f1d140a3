"""Stores in which the processes of a run find each other: on one interface, behind a secret.

A `TCPStore` of torch listens on all interfaces and lets everybody who reaches it read and write its keys.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore  # not exported by torch.distributed


@dataclass(frozen=True)
class StoreAddress:
    """The address of a store.

    Attributes:
        host, port: where it listens.
        secret: prefix of every key.
    """

    host: str
    port: int
    secret: str


def open_store(host: str, timeout_s: float, port: int = 0) -> tuple[PrefixStore, StoreAddress]:
    """Open a store that listens on the interface of `host` only; port 0 is a free one.

    Raises:
        OSError: the port is in use, or `host` is no address of this machine.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, port), family=family, backlog=2048) as listening:
        port = listening.getsockname()[1]
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
    address = StoreAddress(host, port, secrets.token_hex(16))
    return PrefixStore(address.secret, store), address


def connect_store(address: StoreAddress, timeout_s: float) -> PrefixStore:
    """Connect to a store.

    Raises:
        RuntimeError: it cannot be reached in time.
    """
    timeout = timedelta(seconds=timeout_s)
    return PrefixStore(
        address.secret, TCPStore(address.host, address.port, is_master=False, wait_for_workers=False, timeout=timeout)
    )


def group_backend() -> str:
    """Return the backend of a process group: gloo for tensors and objects of the CPU, NCCL for those of GPUs.

    The default group is not bound to a device (`device_id` of `init_process_group`). Otherwise ranks outside a new gloo
    group would wait in `ncclCommSplit` for its members, which never call it (torch 2.13, `_new_process_group_helper`).
    """
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def use_interface_of(host: str) -> None:
    """Make gloo and NCCL listen on the interface that has the address `host`, unless the environment names one."""
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:  # a name, which the libraries resolve themselves
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == str(wanted) for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
