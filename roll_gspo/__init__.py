"""roll_gspo: reinforcement learning of language models from one YAML file, centred on GSPO."""

__version__ = "0.1.0"
