"""Length-prefixed messages between the reward pool and its worker processes."""

from __future__ import annotations

import socket
import struct

_HEADER = struct.Struct("!Q")


def send(connection: socket.socket, payload: bytes) -> None:
    """Send one message; the timeout of the socket applies."""
    connection.sendall(_HEADER.pack(len(payload)) + payload)


def receive(connection: socket.socket) -> bytes:
    """Receive one message.

    Raises:
        EOFError: the peer closed the connection.
    """
    (length,) = _HEADER.unpack(_read(connection, _HEADER.size))
    return _read(connection, length)


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts += part
    return bytes(parts)
