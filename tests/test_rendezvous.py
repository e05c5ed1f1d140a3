"""Stores of the processes of a run."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from roll_gspo.rendezvous import connect_store, group_backend, open_store


def test_store_listens_on_its_address_and_needs_its_secret() -> None:
    store, address = open_store("127.0.0.1", 20)
    listening = [c.laddr for c in psutil.Process(os.getpid()).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [end.ip for end in listening if end.port == address.port] == ["127.0.0.1"]
    connect_store(address, 20).set("key", "ours")
    foreign = TCPStore(address.host, address.port, is_master=False, wait_for_workers=False)
    foreign.set("key", "theirs")
    assert store.get("key") == b"ours" and len(address.secret) == 32


def test_groups_on_gpus_also_have_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, backend in ((False, "gloo"), (True, "cpu:gloo,cuda:nccl")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert group_backend() == backend


def test_port_in_use_is_refused() -> None:
    _store, address = open_store("127.0.0.1", 20)
    with pytest.raises(OSError, match="in use"):
        open_store("127.0.0.1", 20, address.port)
