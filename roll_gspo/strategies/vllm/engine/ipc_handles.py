"""Handles of CUDA IPC as plain JSON values, so that no pickle travels between processes.

A handle is the tuple of arguments with which torch's `rebuild_cuda_tensor` opens the memory of another process.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch

from roll_gspo.errors import WeightTransferError

_CLASSES: dict[str, type] = {
    "Tensor": torch.Tensor,
    "TypedStorage": torch.storage.TypedStorage,
    "UntypedStorage": torch.UntypedStorage,
}
_DTYPES = {str(dtype): dtype for dtype in (torch.uint8,)}  # packed buffers hold bytes

Handles = Mapping[str, tuple[Any, ...]]


def encode_handles(handles: Handles) -> dict[str, list[Any]]:
    """Return the handles of a packed buffer, by the UUID of its GPU, as JSON values."""
    return {uuid: [_encode(value) for value in arguments] for uuid, arguments in handles.items()}


def decode_handles(handles: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    """Return the handles that `encode_handles` encoded.

    Raises:
        WeightTransferError: they contain a class or dtype that no packed buffer has.
    """
    return {uuid: tuple(_decode(value) for value in arguments) for uuid, arguments in handles.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, type):
        return {"class": value.__name__}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    return list(value) if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    if kind == "bytes":
        return base64.b64decode(text)
    table: Mapping[str, Any] = _CLASSES if kind == "class" else _DTYPES
    if text not in table:
        raise WeightTransferError(f"weight transfer: a handle of GPU memory contains the {kind} '{text}'")
    return table[text]
