"""Sandbox that runs untrusted Python programs in isolation; see `host`."""

from __future__ import annotations

from roll_gspo.sandbox.host import Program, Sandbox, SandboxError
from roll_gspo.sandbox.limits import Limits, Outcome

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "SandboxError"]
