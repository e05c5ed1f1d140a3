"""Tiny checkpoints, batches and a loss for the engines' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import Checkpoints
from tiny_models import write_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """family -> folder of its tiny checkpoint, written once."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = write_model(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return folder_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # sums in one order, whatever the machine
