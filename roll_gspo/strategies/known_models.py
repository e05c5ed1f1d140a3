"""Which engines know the architecture of a model, read from the files of the installed packages (no torch)."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from roll_gspo.config.base import Problem
from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import CONFIG
from roll_gspo.models.size import config_value, model_type_of, supported_architecture_of

_REGISTRY_OF_VLLM = "model_executor/models/registry.py"


def check_family(model: str) -> None:
    """Check that transformers knows the architecture of a model; passes if the model is not on this machine.

    Args:
        model: Hugging Face name or folder, or a `builtin:` name.

    Raises:
        ConfigError: the installed version of transformers does not know it.
    """
    if not transformers_knows(model):
        raise ConfigError(
            f"{model}/{CONFIG}: model_type '{model_type_of(model)}' is not known to the installed transformers; "
            f"correct it, or install a newer version ({engines_that_know(model)})"
        )


def check_vllm(model: str) -> None:
    """Check that vLLM knows the architecture of a model, or that transformers does, whose classes vLLM may use.

    Raises:
        ConfigError: neither of the installed versions knows it.
    """
    if (name := unknown_to_vllm(model)) and not transformers_knows(model):
        raise ConfigError(
            f"{model}/{CONFIG}: the architecture {name} is not known to the installed vLLM; correct it, or install a "
            f"newer version ({engines_that_know(model)})"
        )


def engines_that_know(model: str) -> str:
    """Return a clause for errors that names the shipped engines for a model on this machine."""
    names: list[str] = []
    if supported_architecture_of(model) is not None:
        names += ["megatron_train"]
    if transformers_knows(model):
        names += ["fsdp2_train", "hf_train", "hf_infer"]
    if not unknown_to_vllm(model):
        names += ["vllm"]
    return f"engines that know it: {', '.join(names)}" if names else "no engine knows it"


def transformers_knows(model: str) -> bool:
    """Return whether transformers knows the architecture; True if model or package are not on this machine."""
    model_type, families = model_type_of(model), _families()
    return model_type is None or not families or str(model_type).replace("-", "_").startswith(families)


def unknown_to_vllm(model: str) -> str:
    """Return the architecture in `config.json` if vLLM has no class for it; '' otherwise, or if it cannot be told."""
    names, known = config_value(model, "architectures"), _architectures_of_vllm()
    if not isinstance(names, list) or not names or not known or known.intersection(map(str, names)):
        return ""
    return str(names[0])


def attention_problems(model: str, implementation: str) -> Iterator[Problem]:
    """Yield why an implementation of attention in transformers computes something else than the model.

    Args:
        model: Hugging Face name or folder, or a `builtin:` name.
        implementation: value of `attn_implementation`.
    """
    cap = config_value(model, "attn_logit_softcapping")
    if cap is not None and implementation == "sdpa":
        yield Problem(
            "strategy_config.attn_implementation",
            f"sdpa ignores attn_logit_softcapping ({cap}) of the model; use eager, or flash_attention_2 on GPUs",
        )


def _families() -> tuple[str, ...]:
    """Return the model families of the installed transformers: the folders of its models, without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    return tuple(path.name for path in Path(spec.origin).with_name("models").glob("[a-z]*/"))


def _architectures_of_vllm() -> set[str]:
    """Return the keys of all tables in vLLM's registry of models; empty if vLLM is not installed or has changed."""
    try:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            return set()
        module = ast.parse((Path(spec.origin).parent / _REGISTRY_OF_VLLM).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):  # import hooks may raise in place of None
        return set()
    tables = [node.value for node in module.body if isinstance(node, ast.Assign) and _is_table(node)]
    keys = (key for table in tables if isinstance(table, ast.Dict) for key in table.keys)
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _is_table(assignment: ast.Assign) -> bool:
    """Return whether an assignment lists models that are supported now."""
    name = assignment.targets[0].id if isinstance(assignment.targets[0], ast.Name) else ""
    return name.endswith("_MODELS") and not name.startswith("_PREVIOUSLY")
