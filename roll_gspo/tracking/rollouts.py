"""Write `rollouts/` and `validation/` in a thread, so that training does not wait for texts, compression and disk."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from roll_gspo.episode import Episode
from roll_gspo.errors import TrainingError
from roll_gspo.rollout_files import (
    EPISODE_SCHEMA,
    SCHEMA,
    UPDATED_FOLDER,
    UPDATED_SCHEMA,
    StepFile,
    remove_steps,
    step_path,
    valid_texts,
)
from roll_gspo.tracking.episode_columns import episode_columns, turns_column
from roll_gspo.tracking.token_texts import TokenTexts

logger = logging.getLogger(__name__)
_MAX_WAITING = 2  # batches of samples; one of 16M tokens takes 200 MB
_TOKENS_WITH_TEXT = 2**16  # of a row group: readers of texts read whole row groups
_TOKENS_WITHOUT_TEXT = 2**20
_ROUNDED_BITS = 4  # of the 23 of a float32 fraction; six significant digits remain


class TokenLists(NamedTuple):
    """One list per sample of token ids or values: sample i has `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]

    def of(self, row: int) -> list[int]:
        """Return the list of one sample."""
        return self.values[self.offsets[row] : self.offsets[row + 1]].tolist()

    def array(self) -> pa.ListArray:
        """Return the lists as an Arrow array, floats rounded to six significant digits."""
        values = _rounded(self.values) if self.values.dtype == np.float32 else self.values
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(values))


@dataclass(frozen=True)
class SampleBatch:
    """Samples as columns.

    Attributes:
        columns: values per sample by the names of `SCHEMA`, without texts and tokens.
        prompts, ground_truths: texts per sample.
        token_lists: token ids and values per token by the names of `SCHEMA`; missing ones are null in the file.
        with_text: rows of the samples whose texts are written, in this order.
        texts: converts token ids to text, special tokens included.
        episodes: the episode of each sample, None for responses of one turn; empty if no sample is an episode.
    """

    columns: Mapping[str, Sequence[Any]]
    prompts: Sequence[str]
    ground_truths: Sequence[str | None]
    token_lists: Mapping[str, TokenLists]
    with_text: Sequence[int]
    texts: TokenTexts
    episodes: Sequence[Episode | None] = ()

    @property
    def schema(self) -> pa.Schema:
        """Schema of a file that can hold the samples."""
        return EPISODE_SCHEMA if self.episodes else SCHEMA

    def write(self, file: StepFile) -> None:
        """Append the samples to a file: those with texts first."""
        rows = self._without_text(file.schema)
        chosen = np.zeros(rows.num_rows, bool)
        chosen[list(self.with_text)] = True
        first = rows.take(pa.array(self.with_text, pa.int64()))
        for name, values in self._texts().items():
            first = first.set_column(file.schema.names.index(name), file.schema.field(name), values)
        for part, tokens in ((first, _TOKENS_WITH_TEXT), (rows.filter(pa.array(~chosen)), _TOKENS_WITHOUT_TEXT)):
            num_tokens = len(part.column("response_token_ids").flatten())
            file.add(part, max(1, part.num_rows * tokens // max(num_tokens, 1)))

    def _without_text(self, schema: pa.Schema) -> pa.RecordBatch:
        count = len(self.prompts)
        columns = {**self.columns, **episode_columns(self.episodes)} if self.episodes else self.columns
        arrays = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name in self.token_lists:
                arrays.append(self.token_lists[name].array())
            elif name in columns:
                values = columns[name]
                arrays.append(pa.array(valid_texts(values) if kind == pa.string() else values, kind, size=count))
            else:
                arrays.append(pa.nulls(count, kind))
        return pa.record_batch(arrays, schema=schema)

    def _texts(self) -> dict[str, pa.Array]:
        ids = [self.token_lists["response_token_ids"].of(row) for row in self.with_text]
        texts = {"turns": turns_column([self.episodes[row] for row in self.with_text])} if self.episodes else {}
        return {
            **texts,
            "prompt": _text_array([self.prompts[row] for row in self.with_text]),
            "ground_truth": _text_array([self.ground_truths[row] for row in self.with_text]),
            "response": _text_array([self.texts.decode(tokens) for tokens in ids]),
            "response_tokens": pa.array([self.texts(tokens) for tokens in ids], pa.list_(pa.string())),
        }


class RolloutWriter:
    """Write files of samples in a thread. Each file is complete or absent.

    An error of the thread is raised by the next call, at the latest by `flush` before a checkpoint. A killed process
    loses at most files of steps after the last checkpoint, which a resumed run writes again.

    Args:
        folder: `rollouts/` or `validation/` of the run; created with the first file.
        first_step: files of this step or later come from an earlier process and are removed.
    """

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        self._folder = folder
        self._updated = folder.with_name(UPDATED_FOLDER)
        remove_steps(folder, first_step)
        if folder.name == "rollouts":
            remove_steps(self._updated, first_step)
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, step: int, batches: Iterable[SampleBatch]) -> None:
        """Write the samples of a step, batch by batch. Waits while earlier batches fill the queue.

        The file has the columns of episodes if the first batch has episodes.
        """
        steps: list[StepFile] = []
        path = step_path(self._folder, step)

        def file_of(schema: pa.Schema) -> StepFile:
            if not steps:
                steps.append(StepFile(path, schema))
            return steps[0]

        try:
            for batch in batches:
                self._submit(lambda batch=batch: batch.write(file_of(batch.schema)), path)
        except BaseException:
            self._submit(lambda: [file.discard() for file in steps], path)
            raise
        self._submit(lambda: file_of(SCHEMA).complete(), path)

    def write_updated(self, step: int, samples: Sequence[int], log_probs: TokenLists) -> None:
        """Write log-probs of some samples of the step after its update."""
        path = step_path(self._updated, step)
        self._submit(partial(_write_updated, path, samples, log_probs), path)

    def flush(self) -> None:
        """Wait until every file is written.

        Raises:
            TrainingError: a file cannot be written.
        """
        self._jobs.join()
        self._raise_error()

    def close(self) -> None:
        """Write what is left and stop the thread. An error is logged, because the run has ended anyway."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            logger.error("%s", self._error)
            self._error = None

    def _submit(self, job: Callable[[], Any], path: Path) -> None:
        self._raise_error()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"write {self._folder.name}", daemon=True)
            self._thread.start()
        self._jobs.put(partial(self._run, job, path))

    def _run(self, job: Callable[[], Any], path: Path) -> None:
        if self._error is None:
            try:
                job()
            except OSError as error:
                text = f"{path}: cannot be written ({error}); free space, or set log_rollouts: false"
                self._error = TrainingError(text)
            except BaseException as error:
                self._error = error

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is not None:
                job()
            self._jobs.task_done()
            if job is None:
                return

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _write_updated(path: Path, samples: Sequence[int], log_probs: TokenLists) -> None:
    file = StepFile(path, UPDATED_SCHEMA)
    file.add(pa.record_batch([pa.array(samples, pa.int32()), log_probs.array()], schema=UPDATED_SCHEMA))
    file.complete()


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round the fraction of float32 values; bits that are 0 need no space. Non-finite values are kept."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(1 << (_ROUNDED_BITS - 1))) & np.uint32(2**32 - (1 << _ROUNDED_BITS))
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _text_array(texts: Sequence[str | None]) -> pa.Array:
    return pa.array(list(valid_texts(texts)), pa.string())
