"""Compose and validate configurations in this process like `roll_gspo.run`."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import open_dict

from roll_gspo.config.load import Loaded
from roll_gspo.run import ShippedConfigs, hydra_arguments, load_composed

Plugins.instance().register(ShippedConfigs)


def load_config(name: str, *overrides: str, config_dir: Path | None = None) -> Loaded:
    """Load the configuration of `--config-name name key=value ... [--config-dir]`; raises ConfigError."""
    if config_dir is None:
        context = initialize(config_path=None, version_base="1.3")
    else:
        context = initialize_config_dir(str(config_dir), version_base="1.3")
    with context:
        arguments = hydra_arguments(list(overrides), scratch="unused")
        composed = compose(config_name=name, overrides=arguments, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        return load_composed(composed)
