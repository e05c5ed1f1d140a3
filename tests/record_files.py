"""Read the record files that wandb and SwanLab write offline: protobuf records in LevelDB's log format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK_SIZE, HEADER_SIZE = 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[bytes]:
    """Yield every record of a file; both libraries put a header of seven bytes in front."""
    content, position, parts = path.read_bytes(), HEADER_SIZE, b""
    while position + HEADER_SIZE <= len(content):
        if BLOCK_SIZE - position % BLOCK_SIZE < HEADER_SIZE:  # a block ends with padding
            position += BLOCK_SIZE - position % BLOCK_SIZE
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        start = position + HEADER_SIZE
        position = start + length
        parts = content[start:position] if kind in (FULL, FIRST) else parts + content[start:position]
        if kind in (FULL, LAST):
            yield parts
