"""The command `python -m roll_gspo.doctor`: whether this machine can run a configuration."""
