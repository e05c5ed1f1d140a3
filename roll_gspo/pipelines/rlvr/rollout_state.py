"""The groups in flight inside a checkpoint: prompts, responses so far, scores and the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from roll_gspo.batch import Completion, Prompt
from roll_gspo.episode import Episode
from roll_gspo.errors import CheckpointError
from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream
from roll_gspo.rewards.base import RewardResult

STREAM, SAMPLES = "rollouts.json", "rollouts.parquet"
# A dictionary of log-probs, the default of Parquet, takes four times as long and a larger file.
IDS, LOG_PROBS, SPLIT = "token_ids.list.element", "log_probs.list.element", "BYTE_STREAM_SPLIT"
SCHEMA = pa.schema(
    {
        "group": pa.int32(),
        "sample": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float64()),
        "version_runs": pa.list_(pa.int64()),
        "finish_reason": pa.string(),
        "routed_experts": pa.binary(),
        "routed_shape": pa.list_(pa.int32()),
        "result": pa.string(),
        "episode": pa.string(),
    }
)


class Snapshot(NamedTuple):
    """The state of a stream for a checkpoint.

    Attributes:
        scheduler: state of the scheduler.
        draws: number of draws per batch.
        groups: the groups in flight by slot.
        dropped: groups that failed the filter, per batch.
        sampler: state of the sampler after the prompts of these groups.
    """

    scheduler: dict[str, Any]
    draws: dict[int, int]
    groups: dict[int, Group]
    dropped: dict[int, list[Group]]
    sampler: dict[str, Any]


def snapshot(stream: RolloutStream) -> Snapshot:
    """Return the groups in flight of a stream, whose lock the caller holds.

    Unless weights change in flight, a batch that is not complete is left out. It is drawn and sampled again after a
    resume, with the same prompts, seeds and weights.
    """
    size, state, sampler = stream.settings.groups_per_step, stream.scheduler.state_dict(), stream.sampler.state_dict()
    is_complete = not stream.num_missing and not stream.parked and all(g.is_scored for g in stream.groups.values())
    if is_complete or not stream.in_order:
        return Snapshot(state, dict(stream.draws), dict(stream.groups), stream.dropped, sampler)
    newest = max(stream.draws, default=0)
    state |= {"next_group": newest * size, "reused": []}
    state["groups"] = [group for group in state["groups"] if stream.batch_of(group[0]) < newest]
    return Snapshot(
        state,
        {batch: number for batch, number in stream.draws.items() if batch < newest},
        {slot: group for slot, group in stream.groups.items() if stream.batch_of(slot) < newest},
        {batch: groups for batch, groups in stream.dropped.items() if batch < newest},
        stream.before_batch,
    )


def save_groups(stream: RolloutStream, folder: Path) -> None:
    """Write the groups in flight. The caller holds the stream's lock, so that none starts or ends meanwhile.

    A response without a score is scored again after a resume. An unfinished one continues after its tokens.
    """
    state = snapshot(stream)
    if not state.groups and not state.draws:
        return
    partials = stream.partials()
    dropped = [group for groups in state.dropped.values() for group in groups]
    groups = [*state.groups.values(), *dropped]
    rows = [
        _row(number, group, sample, completion)
        for number, group in enumerate(groups)
        for sample, completion in sorted((group.partials | partials.get(group.slot, {}) | group.completions).items())
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    encoding: dict[str, Any] = {"use_dictionary": [IDS], "column_encoding": {LOG_PROBS: SPLIT}}
    pq.write_table(table, folder / SAMPLES, compression="zstd", **encoding)
    document = {
        "max_staleness": stream.settings.max_staleness,
        "in_flight": stream.settings.in_flight,
        "scheduler": state.scheduler,
        "draws": sorted(state.draws.items()),
        "groups": [_group_state(group) for group in groups],
        "num_dropped": [(batch, len(groups)) for batch, groups in state.dropped.items()],
    }
    text = json.dumps(document, default=str)  # rows of parquet files may hold dates
    (folder / STREAM).write_text(text, encoding="utf-8")


def load_groups(stream: RolloutStream, folder: Path, step: int) -> None:
    """Load what `save_groups` wrote. Without such files, no group is in flight after `step`.

    Raises:
        CheckpointError: the files cannot be read, or do not fit the settings.
    """
    if not (folder / STREAM).exists():
        size = stream.settings.groups_per_step
        state = {"groups_per_step": size, "in_order": stream.in_order, "version": step, "next_group": step * size}
        stream.scheduler.load_state_dict(state | {"reused": [], "groups": []})
        return
    try:
        document = json.loads((folder / STREAM).read_text(encoding="utf-8"))
        groups = [_group_of(state) for state in document["groups"]]
        for row in pq.read_table(folder / SAMPLES).to_pylist():
            _add(groups[row["group"]], row)
        loaded = _snapshot(document, groups)
        _check_settings(stream, document, groups, folder / STREAM)
        stream.scheduler.load_state_dict(loaded.scheduler)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, pa.ArrowException) as error:
        raise CheckpointError(f"{folder / STREAM}: cannot be read ({error}); choose another checkpoint") from error
    stream.draws.update(loaded.draws)
    stream.groups.update(loaded.groups)
    stream.num_scored = sum(len(group.results) for group in stream.groups.values())
    stream.dropped.update(loaded.dropped)


def _check_settings(stream: RolloutStream, document: dict[str, Any], groups: list[Group], path: Path) -> None:
    settings = stream.settings
    if (document["max_staleness"], document["in_flight"]) != (settings.max_staleness, settings.in_flight):
        mode = "in_flight" if document["in_flight"] else "one_step_off"
        raise CheckpointError(
            f"{path}: holds untrained groups of async_generation_ratio {document['max_staleness']}, async_mode {mode}; "
            "set both as they were"
        )
    size, num_samples = document["scheduler"]["groups_per_step"], {len(group.seeds) for group in groups}
    if size != settings.groups_per_step or num_samples - {settings.sampling.num_samples}:
        raise CheckpointError(
            f"{path}: holds untrained groups of rollout_batch_size {size}, num_return_sequences_in_group "
            f"{', '.join(map(str, sorted(num_samples)))}; set both as they were"
        )


def _snapshot(document: dict[str, Any], groups: list[Group]) -> Snapshot:
    dropped: dict[int, list[Group]] = {}
    end = first = len(groups) - sum(number for _, number in document["num_dropped"])
    for batch, number in document["num_dropped"]:
        dropped[batch], end = groups[end : end + number], end + number
    by_slot = {group.slot: group for group in groups[:first]}
    started = {number: is_finished for number, _, is_finished in document["scheduler"]["groups"]}
    if started != {slot: by_slot[slot].is_scored for slot in started} or len(started) != len(by_slot):
        raise ValueError("the groups differ from those of the scheduler, or samples are missing")
    return Snapshot(document["scheduler"], dict(document["draws"]), by_slot, dropped, {})


def _row(number: int, group: Group, sample: int, completion: Completion) -> dict[str, Any]:
    experts, result = completion.routed_experts, group.results.get(sample)
    return {
        "group": number,
        "sample": sample,
        "token_ids": completion.token_ids,
        "log_probs": completion.log_probs,
        "version_runs": [number for run in completion.version_runs for number in run],
        "finish_reason": completion.finish_reason,
        "routed_experts": None if experts is None else experts.numpy().tobytes(),
        "routed_shape": None if experts is None else list(experts.shape),
        "result": None if result is None else json.dumps(vars(result) | {"components": dict(result.components)}),
        "episode": None if completion.episode is None else completion.episode.to_json(),
    }


def _group_state(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "slot": group.slot,
        "draw": group.draw,
        "domain": group.domain,
        "seeds": group.seeds,
        "prompt": {"token_ids": prompt.token_ids, "text": prompt.text, "row": prompt.row},
        "is_filler": group.is_filler,
    }


def _group_of(state: dict[str, Any]) -> Group:
    prompt = Prompt(tuple(state["prompt"]["token_ids"]), state["prompt"]["text"], state["prompt"]["row"])
    return Group(
        state["slot"], state["draw"], prompt, state["domain"], tuple(state["seeds"]), is_filler=state["is_filler"]
    )


def _add(group: Group, row: dict[str, Any]) -> None:
    runs, experts = row["version_runs"], None
    if row["routed_experts"] is not None:
        flat = torch.frombuffer(bytearray(row["routed_experts"]), dtype=torch.int16)
        experts = flat.reshape(row["routed_shape"])
    completion = Completion(
        tuple(row["token_ids"]),
        tuple(row["log_probs"]),
        row["finish_reason"],
        experts,
        tuple(zip(runs[::2], runs[1::2], strict=True)),
        _episode_of(row),
    )
    if completion.finish_reason == "partial":
        group.partials[row["sample"]] = completion
        return
    group.completions[row["sample"]] = completion
    if row["result"] is not None:
        group.results[row["sample"]] = RewardResult(**json.loads(row["result"]))


def _episode_of(row: dict[str, Any]) -> Episode | None:
    text = row.get("episode")  # files of earlier versions lack the column
    if text is None:
        return None
    episode = Episode.from_json(text)
    if len(episode.mask) != len(row["token_ids"]):
        raise ValueError(f"an episode has {len(episode.mask)} tokens, its response {len(row['token_ids'])}")
    return episode
