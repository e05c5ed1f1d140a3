"""Common work of the ranks of an engine: gather results of samples and reports, and write the exported model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.errors import CheckpointError
from roll_gspo.metrics import Metric
from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.strategies.base import ModelSetup, WeightSource
from roll_gspo.strategies.reports import Report, on_host


def gather_samples(
    found: list[tuple[Tensor, list[Tensor]]], sequences: Sequences, device: torch.device
) -> list[Tensor]:
    """All-gather per-sample results. Each sample was computed on one rank; every rank gets the full batch."""
    shapes = [[(tuple(figure.shape[2:]), figure.dtype) for figure in figures] for _, figures in found[:1]]
    if dist.get_world_size() > 1:
        known: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(known, shapes)
        shapes = next((other for other in known if other), [[]])
    width = sequences.response_mask.shape[1]
    wholes = []
    for number, (trailing, dtype) in enumerate(shapes[0] if shapes else []):
        width_of = sequences.input_ids.shape[1] if trailing else width
        whole = torch.zeros(len(sequences), width_of, *trailing, dtype=dtype, device=device)
        for index, figures in found:
            whole[index.to(device), : figures[number].shape[1]] = figures[number]
        if dist.get_world_size() > 1:
            dist.all_reduce(whole)
        wholes.append(whole.cpu())
    return wholes


def gather_reports(reports: list[Report]) -> list[tuple[float, dict[str, Metric]]]:
    """All-gather the reports in host memory; every rank gets them in the same order."""
    mine = on_host(reports)
    if dist.get_world_size() == 1:
        return mine
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [report for of_rank in found for report in of_rank]


def write_by_first_rank(folder: Path, setup: ModelSetup, source: WeightSource) -> None:
    """Write a model in Hugging Face layout on rank 0, which reads it back; a collective.

    Raises:
        CheckpointError: rank 0 could not write; raised on every rank.
    """
    weights = iter(source)
    with fails_on_every_rank():
        try:
            if dist.get_rank() == 0:
                write_checkpoint(folder, setup.checkpoint, weights, setup.dtype)
        finally:
            for _ in weights:  # other ranks wait for this rank's part even if writing has failed
                pass


@contextmanager
def fails_on_every_rank() -> Iterator[None]:
    """Raise a `CheckpointError` of rank 0 on every rank at the end of the context, which is a collective."""
    outcome: list[CheckpointError | None] = [None]
    try:
        yield
    except CheckpointError as error:
        outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
