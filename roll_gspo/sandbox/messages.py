"""Messages over a socket, each with a JSON header and a body of bytes.

Data from a sandbox is untrusted and never unpickled.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

_SIZES = struct.Struct("!II")
MAX_HEADER = 1 << 20
MAX_BODY = 1 << 30


class InvalidMessageError(Exception):
    """The peer sent a malformed message, or one that is too large."""


def send(sock: socket.socket, header: dict[str, Any], body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
    """Send one message.

    Args:
        sock: connected socket; descriptors need a Unix socket.
        header: JSON object.
        body: bytes of the body.
        descriptors: open file descriptors to send.

    Raises:
        OSError: the peer closed the connection, or does not read within the timeout of the socket.
    """
    text = json.dumps(header).encode()
    sizes = _SIZES.pack(len(text), len(body))
    if descriptors:
        socket.send_fds(sock, [sizes], list(descriptors))
        sizes = b""
    sock.sendall(sizes + text + body)


def receive(
    sock: socket.socket, max_body: int = MAX_BODY, max_descriptors: int = 0, deadline: float | None = None
) -> tuple[dict[str, Any], bytes, list[int]]:
    """Receive the next message, and return its header, body and descriptors.

    Args:
        sock: connected socket. Its timeout applies to each part of a message; a deadline changes it.
        max_body: maximum size of the body in bytes.
        max_descriptors: maximum number of descriptors; further ones are closed.
        deadline: time by which the whole message must have arrived, in seconds of `time.monotonic()`.

    Raises:
        EOFError: the peer closed the connection.
        InvalidMessageError: the message is malformed or too large.
        OSError: the timeout of the socket expired.
    """
    _set_timeout(sock, deadline)
    start, descriptors = _receive_start(sock, max_descriptors)
    try:
        header_size, body_size = _SIZES.unpack(start + _receive_exactly(sock, _SIZES.size - len(start), deadline))
        if header_size > MAX_HEADER or body_size > max_body:
            raise InvalidMessageError(f"a message of {header_size} + {body_size} bytes")
        try:
            header = json.loads(_receive_exactly(sock, header_size, deadline))
        except (ValueError, RecursionError):
            raise InvalidMessageError("the header is not JSON") from None
        if not isinstance(header, dict):
            raise InvalidMessageError("the header is not an object")
        return header, _receive_exactly(sock, body_size, deadline), descriptors
    except BaseException:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        raise


def _receive_start(sock: socket.socket, max_descriptors: int) -> tuple[bytes, list[int]]:
    if not max_descriptors:  # recv discards descriptors
        start, descriptors = sock.recv(_SIZES.size), []
    else:
        ancillary_size = socket.CMSG_SPACE(max_descriptors * array.array("i").itemsize)
        start, ancillary, _, _ = sock.recvmsg(_SIZES.size, ancillary_size, socket.MSG_CMSG_CLOEXEC)
        received = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
        descriptors = list(received)
    if not start:
        raise EOFError
    return start, descriptors


def _set_timeout(sock: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        sock.settimeout(max(0.001, deadline - time.monotonic()))


def _receive_exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        _set_timeout(sock, deadline)
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
