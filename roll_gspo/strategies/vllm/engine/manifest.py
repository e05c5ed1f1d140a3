"""The expected tensors of a full model or of an adapter, and the check of a received set against them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from roll_gspo.errors import WeightTransferError

_LISTED = 8
_ADAPTER = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_IN_LAYERS = re.compile(r".*\.\d+\.(?:.*\.)?([A-Za-z]\w*)\.weight")

Arrived = Sequence[tuple[str, tuple[int, ...], torch.dtype]]


def expected_shapes(checkpoint: Path, tied: bool) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of a model's tensors from the headers of its safetensors files.

    Args:
        checkpoint: folder in Hugging Face layout.
        tied: true if the output head is the embedding, so that it is not sent.

    Raises:
        WeightTransferError: the folder has no safetensors file.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [checkpoint / name for name in names]
    else:
        files = [checkpoint / "model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.exists():
            raise WeightTransferError(
                f"weight transfer: no {file.name} in {checkpoint}, so the manifest of the model is unknown; "
                "save the checkpoint in safetensors format"
            )
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if tied:
        shapes.pop("lm_head.weight", None)
    # A constant in old Llama checkpoints that no engine loads.
    return {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def differences(expected: Mapping[str, tuple[int, ...]], arrived: Arrived) -> list[str]:
    """Compare received tensors with the expected ones; return one clause per kind of difference."""
    counts = Counter(name for name, _, _ in arrived)
    known = [item for item in arrived if item[0] in expected]
    kinds = {
        "missing": [name for name in expected if name not in counts],
        "unexpected": [name for name in counts if name not in expected],
        "sent twice": [name for name, count in counts.items() if count > 1],
        "of another shape": [
            f"{name} {list(shape)}, not {list(expected[name])}" for name, shape, _ in known if shape != expected[name]
        ],
        "not floating point": [f"{name} {dtype}" for name, _, dtype in known if not dtype.is_floating_point],
    }
    return [f"{len(found)} {kind}: {_listed(found)}" for kind, found in kinds.items() if found]


def linear_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return names like `q_proj` of the linear layers inside a model's layers, given the shapes of its weights."""
    found = (_IN_LAYERS.fullmatch(name) for name, shape in shapes.items() if len(shape) == 2)
    return sorted({match[1] for match in found if match is not None})


class AdapterManifest:
    """The expected tensors of an adapter under PEFT's names: two matrices per adapted module.

    The first accepted update decides which modules are adapted.

    Args:
        rank: rank of the adapter.
        base: shapes of the model's weights. Modules that it lacks may have any shape.
        adaptable: returns whether the engine can adapt a module.
    """

    def __init__(self, rank: int, base: Mapping[str, tuple[int, ...]], adaptable: Callable[[str], bool]) -> None:
        self._rank = rank
        self._base = base
        self._adaptable = adaptable
        self._modules: tuple[str, ...] = ()

    def check(self, arrived: Arrived) -> list[str]:
        """Compare received tensors with the expected ones; return one clause per kind of difference."""
        matches = (_ADAPTER.fullmatch(name) for name, _, _ in arrived)
        named = tuple(dict.fromkeys(match[1] for match in matches if match is not None))
        if not named:
            return ["no tensor of an adapter in PEFT's layout (base_model.model.<module>.lora_A.weight)"]
        foreign = [module for module in named if not self._adaptable(module)]
        found = [f"{len(foreign)} modules that vLLM cannot adapt: {_listed(foreign)}"] if foreign else []
        modules = self._modules or named
        found += differences(self._expected(modules, {name: shape for name, shape, _ in arrived}), arrived)
        if not found:
            self._modules = modules
        return found

    def _expected(self, modules: Sequence[str], arrived: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        expected = {}
        for module in modules:
            first, second = (f"base_model.model.{module}.lora_{matrix}.weight" for matrix in "AB")
            outputs, inputs = self._base.get(f"{module}.weight") or (
                *arrived.get(second, (0,))[:1],
                *arrived.get(first, (0,))[-1:],
            )
            expected |= {first: (self._rank, inputs), second: (outputs, self._rank)}
        return expected


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
