"""Tools: functions that a model may call during an episode."""

from __future__ import annotations

from roll_gspo.tools.calls import FORMATS, Call, MalformedCall
from roll_gspo.tools.tool import Tool, ToolError

__all__ = ["FORMATS", "Call", "MalformedCall", "Tool", "ToolError"]
