"""Tools: functions that a model may call during an episode."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from roll_gspo.tools.calls import FORMATS, Call, MalformedCall

if TYPE_CHECKING:
    from roll_gspo.tools.tool import Tool, ToolError

__all__ = ["FORMATS", "Call", "MalformedCall", "Tool", "ToolError"]


def __getattr__(name: str) -> Any:
    # Environments in another Python read calls, but its installation may lack the packages of tools.
    if name in ("Tool", "ToolError"):
        return getattr(import_module("roll_gspo.tools.tool"), name)
    raise AttributeError(f"module 'roll_gspo.tools' has no attribute '{name}'")
