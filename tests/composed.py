"""Compose and validate configurations in this process like `roll_gspo.run`."""

from __future__ import annotations

from pathlib import Path

from roll_gspo import api
from roll_gspo.config.load import Loaded


def load_config(name: str, *overrides: str, config_dir: Path | None = None) -> Loaded:
    """Load the configuration of `--config-name name key=value ... [--config-dir]`; raises ConfigError."""
    return api.load(name, overrides, config_dir)
