"""The files of samples: `rollouts/step_000012.parquet`, and the same in `validation/`.

A file has one row per sample. The samples that have texts come first, so that readers of texts need not read the
others. `updated_log_probs/step_000012.parquet` has log-probs after the update for some samples of the step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

Sample = dict[str, Any]
"""A row by column name. `components` and the `metrics` of `turns` are dictionaries; `updated_log_probs` is added to
traced samples.

Files of earlier versions lack `version_runs` and `staleness`. Only files with episodes have `EPISODE_FIELDS`.
"""

SCHEMA = pa.schema(
    {
        "sample": pa.int32(),
        "id": pa.string(),
        "source": pa.string(),
        "domain": pa.string(),
        "group": pa.int32(),
        "score": pa.float64(),
        "failed": pa.bool_(),
        "failure": pa.string(),
        "answer": pa.string(),
        "components": pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()})),
        "advantage": pa.float32(),
        "finish_reason": pa.string(),
        "response_length": pa.int32(),
        "weights_version": pa.int32(),
        "prompt": pa.string(),
        "response": pa.string(),
        "ground_truth": pa.string(),
        "response_tokens": pa.list_(pa.string()),
        "prompt_token_ids": pa.list_(pa.int32()),
        "response_token_ids": pa.list_(pa.int32()),
        "rollout_log_probs": pa.list_(pa.float32()),
        "old_log_probs": pa.list_(pa.float32()),
        "advantages": pa.list_(pa.float32()),
        "version_runs": pa.list_(pa.struct({"version": pa.int32(), "tokens": pa.int32()})),
        "staleness": pa.int32(),
    }
)
_METRICS = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))
_MESSAGE = pa.struct({"role": pa.string(), "content": pa.string(), "fields": pa.string()})
_TURN = {
    "answer": pa.string(),
    "messages": pa.list_(_MESSAGE),
    "reward": pa.float64(),
    "invalid": pa.bool_(),
    "metrics": _METRICS,
    "given_tokens": pa.int32(),
    "tokens": pa.int32(),
}
EPISODE_FIELDS = {
    "end": pa.string(),
    "traceback": pa.string(),
    "num_turns": pa.int32(),
    "given_length": pa.int32(),
    "num_rewritten": pa.int32(),
    "num_branches": pa.int32(),
    "response_mask": pa.list_(pa.bool_()),
    "turns": pa.list_(pa.struct(_TURN)),
}
EPISODE_SCHEMA = pa.schema([*SCHEMA, *(pa.field(name, kind) for name, kind in EPISODE_FIELDS.items())])
"""Schema of files with episodes. The added columns are null for responses of one turn."""

UPDATED_SCHEMA = pa.schema({"sample": pa.int32(), "log_probs": pa.list_(pa.float32())})
UPDATED_FOLDER = "updated_log_probs"


class RolloutFile(NamedTuple):
    """The file with the samples of one step."""

    step: int
    path: Path


@dataclass(frozen=True)
class SamplesRead:
    """Samples of one file.

    Attributes:
        samples: ordered by their position in the batch (`sample`).
        num_samples: number of samples in the file.
        num_bytes: number of bytes that were read.
    """

    samples: list[Sample]
    num_samples: int
    num_bytes: int


def step_path(folder: Path, step: int) -> Path:
    """Return the path of a step's file."""
    return folder / f"step_{step:06d}.parquet"


def rollout_files(folder: Path) -> list[RolloutFile]:
    """Return the files of a folder such as `rollouts/`, ordered by step."""
    found = [(re.fullmatch(r"step_(\d+)\.parquet", path.name), path) for path in folder.glob("step_*.parquet")]
    return sorted(RolloutFile(int(match[1]), path) for match, path in found if match)


def read_samples(path: Path, max_bytes: int | None = None, with_text_only: bool = False) -> SamplesRead:
    """Read the samples of a step.

    Args:
        path: the file.
        max_bytes: stop after the row group that exceeds this many bytes, uncompressed. The first samples have texts,
            and those that were scored again after the update come before all others.
        with_text_only: skip samples without texts.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read, or is no Parquet file.
    """
    samples: list[Sample] = []
    num_bytes = 0
    with parquet.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            if max_bytes is not None and num_bytes >= max_bytes:
                break
            group = file.metadata.row_group(index)
            if with_text_only and not _has_text(group):
                break
            num_bytes += group.total_byte_size
            samples += file.read_row_group(index, use_threads=False).to_pylist()
        num_samples = file.metadata.num_rows
    updated = _updated_log_probs(path)
    for sample in samples:
        if sample.get("components") is not None:
            sample["components"] = _by_name(sample["components"])
        for turn in sample.get("turns") or ():
            turn["metrics"] = _by_name(turn["metrics"])
        if sample["sample"] in updated:
            sample["updated_log_probs"] = updated[sample["sample"]]
    if with_text_only:
        samples = [sample for sample in samples if sample["response"] is not None]
    return SamplesRead(sorted(samples, key=lambda sample: sample["sample"]), num_samples, num_bytes)


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns of all samples, in the order of the file. Columns of a value per sample are small.

    A column that the file lacks is full of None.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read, or is no Parquet file.
    """
    with parquet.ParquetFile(path) as file:
        known = [name for name in names if name in file.schema_arrow.names]
        columns = file.read(known, use_threads=False).to_pydict()
        return {name: columns.get(name, [None] * file.metadata.num_rows) for name in names}


def _by_name(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {entry["name"]: entry["value"] for entry in entries}


def _has_text(group: Any) -> bool:
    columns = (group.column(index) for index in range(group.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == "response")
    return statistics is None or statistics.null_count < group.num_rows


def _updated_log_probs(path: Path) -> dict[int, list[float]]:
    updated = path.parent.with_name(UPDATED_FOLDER) / path.name
    if path.parent.name != "rollouts" or not updated.is_file():
        return {}
    rows = parquet.read_table(updated, use_threads=False, memory_map=False).to_pylist()
    return {row["sample"]: row["log_probs"] for row in rows}


class StepFile:
    """A file of a step that is complete or absent: written aside, synced and renamed.

    Args:
        path: the file.
        schema: `SCHEMA`, `EPISODE_SCHEMA` or `UPDATED_SCHEMA`.
    """

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA) -> None:
        self.schema = schema
        self._path = path
        self._aside = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._aside.open("wb")
        values = [name for name in schema.names if _is_list_of_numbers(schema.field(name).type)]
        options: dict[str, Any] = {
            "compression": "zstd",
            "use_dictionary": [*(name for name in schema.names if name not in values), "response_tokens.list.element"],
            # Bytes of equal significance lie together: high bytes of ids and low bytes of log-probs are zeros.
            "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in values},
        }
        self._writer = parquet.ParquetWriter(self._file, schema, **options)

    def add(self, rows: pa.RecordBatch, row_group_size: int | None = None) -> None:
        """Append rows, in row groups of at most `row_group_size` rows."""
        if rows.num_rows:
            self._writer.write_batch(rows, row_group_size=row_group_size)

    def complete(self) -> None:
        """Give the file its name."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self._path)

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


def remove_steps(folder: Path, first_step: int) -> None:
    """Remove files of `first_step` and later, and files that were not completed."""
    for path in folder.glob("step_*.parquet*"):
        match = re.fullmatch(r"step_(\d+)\.parquet(\.tmp)?", path.name)
        if match and (match[2] or int(match[1]) >= first_step):
            path.unlink()


def valid_texts(texts: Sequence[str | None]) -> Iterator[str | None]:
    """Yield the texts with lone surrogates escaped, because they have no UTF-8."""
    for text in texts:
        yield None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
