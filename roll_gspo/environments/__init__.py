"""Environments: the other side of a conversation over several turns."""

from roll_gspo.environments.base import Environment, Reply, Start

__all__ = ["Environment", "Reply", "Start"]
