"""Model families of the installed transformers, read from its folders (no torch)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import CONFIG
from roll_gspo.models.size import model_type_of


def check_family(model: str) -> None:
    """Check that transformers knows the architecture of a model; passes if the model is not on this machine.

    Args:
        model: Hugging Face name or folder, or a `builtin:` name.

    Raises:
        ConfigError: the installed version of transformers does not know it.
    """
    model_type, families = model_type_of(model), _families()
    if model_type is not None and families and not str(model_type).replace("-", "_").startswith(families):
        raise ConfigError(
            f"{model}/{CONFIG}: model_type '{model_type}' is not known to the installed transformers; correct it, "
            "or install a newer version"
        )


def _families() -> tuple[str, ...]:
    """Return the model families of the installed transformers: the folders of its models, without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    return tuple(path.name for path in Path(spec.origin).with_name("models").glob("[a-z]*/"))
