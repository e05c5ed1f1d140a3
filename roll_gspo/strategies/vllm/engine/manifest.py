"""The expected tensors of a full model, and the check of a received set against them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from roll_gspo.errors import WeightTransferError

_LISTED = 8


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


def differences(
    expected: Mapping[str, tuple[int, ...]], arrived: Sequence[tuple[str, tuple[int, ...], torch.dtype]]
) -> list[str]:
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


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
