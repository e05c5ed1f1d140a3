"""Length-prefixed messages between a pool and its worker processes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_HEADER = struct.Struct("!Q")
_MAX_MESSAGE_BYTES = 1 << 30
_CHUNK = 1 << 20


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


class MessageReader:
    """Receive messages without waiting for the rest of one: the peer may never send it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def read(self) -> Iterator[bytes]:
        """Receive once, and yield the messages that are complete.

        Raises:
            EOFError: the peer closed the connection, or sent no message.
        """
        try:
            part = self._connection.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not part:
            raise EOFError("the connection was closed")
        self._buffer += part
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > _MAX_MESSAGE_BYTES:
                raise EOFError("the peer sent no message")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            message = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield message


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), _CHUNK))
        if not part:
            raise EOFError("the connection was closed")
        parts += part
    return bytes(parts)
