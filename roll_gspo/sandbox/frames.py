"""Messages over a socket: a JSON header and bytes. Nothing that comes out of a sandbox is trusted, nor unpickled."""

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


class BadFrameError(Exception):
    """The other side sent something that is no message, or too much."""


def send(sock: socket.socket, header: dict[str, Any], body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
    """Send one message, with open descriptors where the socket is of the UNIX family.

    Raises:
        OSError: the other side is gone, or does not read within the socket's timeout.
    """
    text = json.dumps(header).encode()
    start = _SIZES.pack(len(text), len(body))
    if descriptors:
        socket.send_fds(sock, [start], list(descriptors))
        start = b""
    sock.sendall(start + text + body)


def receive(
    sock: socket.socket, max_body: int = MAX_BODY, max_descriptors: int = 0, deadline: float | None = None
) -> tuple[dict[str, Any], bytes, list[int]]:
    """Header, body and descriptors of the next message.

    Args:
        sock: its timeout is for each part of a message, and is changed where there is a deadline.
        max_body: bytes.
        max_descriptors: further ones are closed.
        deadline: `time.monotonic()` by which the whole message must be there.

    Raises:
        EOFError: the other side is gone.
        BadFrameError: what it sent is no message.
        OSError: nothing came within the socket's timeout.
    """
    _set_timeout(sock, deadline)
    start, descriptors = _receive_start(sock, max_descriptors)
    try:
        header_size, body_size = _SIZES.unpack(start + _exactly(sock, _SIZES.size - len(start), deadline))
        if header_size > MAX_HEADER or body_size > max_body:
            raise BadFrameError(f"a message of {header_size} + {body_size} bytes")
        try:
            header = json.loads(_exactly(sock, header_size, deadline))
        except (ValueError, RecursionError):
            raise BadFrameError("the header is not JSON") from None
        if not isinstance(header, dict):
            raise BadFrameError("the header is not an object")
        return header, _exactly(sock, body_size, deadline), descriptors
    except BaseException:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        raise


def _receive_start(sock: socket.socket, max_descriptors: int) -> tuple[bytes, list[int]]:
    if not max_descriptors:  # recv drops descriptors that are sent along
        start, found = sock.recv(_SIZES.size), []
    else:
        room = socket.CMSG_SPACE(max_descriptors * array.array("i").itemsize)
        start, ancillary, _, _ = sock.recvmsg(_SIZES.size, room, socket.MSG_CMSG_CLOEXEC)
        held = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                held.frombytes(data[: len(data) - len(data) % held.itemsize])
        found = list(held)
    if not start:
        raise EOFError
    return start, found


def _set_timeout(sock: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        sock.settimeout(max(0.001, deadline - time.monotonic()))


def _exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        _set_timeout(sock, deadline)
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
