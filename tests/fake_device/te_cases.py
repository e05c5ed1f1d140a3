"""Models of TransformerEngine's layers, filled from checkpoints and exported, in a process that does only this."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from fake_device import te_stubs

from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.strategies.megatron.config import MegatronConfig


def exported(models: list[tuple[Path, bool]]) -> list[list[str]]:
    """Fill and export models; return the names of their parameters.

    Args:
        models: checkpoints, and whether their experts are one grouped product.
    """
    te_stubs.install()
    from roll_gspo.strategies.megatron.engine.model import _build_chunk, transformer_config
    from roll_gspo.strategies.megatron.engine.parallel import initialize_parallel
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights, load_weights

    names = []
    for folder, grouped in models:
        config = MegatronConfig(moe_grouped_gemm=grouped)
        architecture, reader = Architecture.from_checkpoint(folder), CheckpointReader(folder)
        initialize_parallel(config, 0)
        with mock.patch("torch.cuda.is_available", lambda: True):
            chunk = _build_chunk(architecture, transformer_config(architecture, torch.float32, config), None)
        load_weights([chunk], reader, architecture)
        found = dict(MegatronWeights([chunk], architecture))
        assert found.keys() | {"lm_head.weight"} == reader.names | {"lm_head.weight"}
        wrong = [name for name, tensor in found.items() if not torch.equal(tensor, reader.read(name))]
        assert not wrong, wrong
        names.append([name for name, _ in chunk.named_parameters()])
    return names
