"""Groups in flight inside checkpoints: a resumed stream continues as if it had not stopped."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_cases import (
    FILTERS,
    PROMPTS,
    REJECT_ALL,
    Run,
    completion_state,
    group_state,
    states,
    stream_settings,
    text_of,
)

from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.batch import Completion
from roll_gspo.episode import Episode, EpisodeTurn
from roll_gspo.errors import CheckpointError
from roll_gspo.pipelines.rlvr.collect import Collector
from roll_gspo.pipelines.rlvr.rollout_state import SAMPLES, STREAM
from roll_gspo.tracking.console import Progress


def saved_at_every_pump(run: Run, folder: Path) -> dict[Path, int]:
    """Train all steps; return the folder and the step of a checkpoint after each pump."""
    found: dict[Path, int] = {}

    def save() -> None:
        path = folder / str(len(found))
        run.save(path)
        found[path] = run.step

    run.at_pump = save
    return found


@pytest.mark.parametrize(
    ("max_staleness", "filters", "max_rounds", "size"),
    [
        (0, {}, 1, 3),
        (0, FILTERS, 3, 3),
        (1, {}, 1, 3),
        (2, FILTERS, 3, 3),
        (1, REJECT_ALL, 2, 3),
        (1, REJECT_ALL, 4, 1),
    ],
)
def test_stream_in_order_resumes_bit_for_bit_from_every_point(
    tmp_path: Path, max_staleness: int, filters: dict[str, QueryFilterSettings], max_rounds: int, size: int
) -> None:
    chosen = stream_settings(max_staleness, 3, groups_per_step=size, query_filters=filters, max_rounds=max_rounds)
    run = Run(chosen, interleaved=True, records_experts=True)
    points = saved_at_every_pump(run, tmp_path)
    batches = run.train_all()
    assert len(points) > 10
    for order, (path, step) in enumerate(itertools.islice(points.items(), 0, None, 4 if size > 1 else 1)):
        resumed = Run(chosen, order, interleaved=True, records_experts=True)
        resumed.load(path)
        assert states(resumed.train_all()) == states(batches[step:]), path


@pytest.mark.parametrize("partial_rollouts", ["continue", "restart", "drop"])
@pytest.mark.parametrize("filters", [{}, FILTERS])
def test_stream_in_flight_keeps_every_group_and_token(
    tmp_path: Path, partial_rollouts: str, filters: dict[str, QueryFilterSettings]
) -> None:
    chosen = stream_settings(2, 4, 3, in_flight=True, partial_rollouts=partial_rollouts, query_filters=filters)
    run = Run(chosen, 5, records_experts=True)
    points: list[tuple[Path, int, Any]] = []

    def save() -> None:
        path = tmp_path / str(len(points))
        run.save(path)
        points.append((path, run.step, contents(run)))

    run.at_pump = save
    run.train_all()
    assert any(partials for _, _, (_, partials, *_) in points)
    for order, (path, step, expected) in enumerate(points[::4]):
        resumed = Run(chosen, order, records_experts=True)
        resumed.load(path)
        assert contents(resumed) == expected
        with resumed.stream.changing_weights():  # as at the start of a run
            resumed.generator.update_weights(cast(Any, None), step)
        assert contents(resumed) == expected, "partial responses continue with these weights"
        seen = set[int]()
        pending = {group.draw for group in resumed.stream.groups.values()}
        for batch in resumed.train_all():
            assert min(batch.versions) >= batch.step - 1 - 2
            draws = {group.draw for group in [*batch.groups, *batch.dropped]}
            assert not draws & seen
            seen |= draws
        assert partial_rollouts == "drop" or pending <= seen
        assert not resumed.stream.groups


def contents(run: Run) -> tuple[Any, ...]:
    """Return the groups in flight, their unfinished responses, dropped groups, draws and scheduler of a stream."""
    stream = run.stream
    running = stream.partials()
    partials = {
        (slot, sample): completion_state(completion)
        for slot, group in stream.groups.items()
        for sample, completion in (group.partials | running.get(slot, {})).items()
    }
    groups = {slot: group_state(group) for slot, group in stream.groups.items()}
    dropped = {batch: [group_state(group) for group in of_batch] for batch, of_batch in stream.dropped.items()}
    return groups, partials, dropped, dict(stream.draws), stream.scheduler.state_dict()


def test_draws_go_on_if_no_group_is_in_flight(tmp_path: Path) -> None:
    """Otherwise a run that is resumed with more steps would use its seeds again."""
    run = Run(stream_settings(1, 2, in_flight=True))
    run.train_all()
    assert not run.stream.groups
    run.save(tmp_path / "end")
    longer = Run(stream_settings(1, 3, in_flight=True))
    longer.load(tmp_path / "end")
    assert sorted(group.draw for group in longer.train().groups) == list(range(8, 12))


def test_columns_of_parquet_files_may_hold_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for prompt in PROMPTS:
        monkeypatch.setitem(cast(dict[str, Any], prompt.row), "day", datetime.date(2026, 1, 2))
    run = Run(stream_settings(1, 2))
    run.pump()
    run.wait(run.stream.can_change_weights)
    run.save(tmp_path / "saved")
    resumed = Run(stream_settings(1, 2))
    resumed.load(tmp_path / "saved")
    assert {group.prompt.row["day"] for group in resumed.stream.groups.values()} == {"2026-01-02"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = Run(stream_settings(1, 4))
    run.train()
    run.wait(run.stream.can_change_weights)
    run.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"max_staleness": 2}, "async_generation_ratio 1, async_mode one_step_off"),
        ({"max_staleness": 0}, "async_generation_ratio 1, async_mode one_step_off"),
        ({"in_flight": True}, "async_generation_ratio 1, async_mode one_step_off"),
        ({"groups_per_step": 2}, "rollout_batch_size 4, num_return_sequences_in_group 3"),
    ],
)
def test_other_settings_are_refused(saved: Path, other: dict[str, Any], expected: str) -> None:
    run = Run(stream_settings(**({"max_staleness": 1} | other)))
    with pytest.raises(
        CheckpointError, match=rf"{STREAM}: holds untrained groups of {expected}; set both as they were"
    ):
        run.load(saved)
    assert not run.stream.groups and run.stream.scheduler.version == 0


def edited(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / STREAM).read_text())
        change(document)
        (folder / STREAM).write_text(json.dumps(document))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / STREAM).write_text("{"),
        lambda folder: (folder / STREAM).write_text("[]"),
        lambda folder: (folder / STREAM).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / SAMPLES).unlink(),
        lambda folder: (folder / SAMPLES).write_bytes(b"PAR1"),
        lambda folder: pq.write_table(pq.read_table(folder / SAMPLES).drop_columns(["token_ids"]), folder / SAMPLES),
        lambda folder: pq.write_table(pq.read_table(folder / SAMPLES).slice(1), folder / SAMPLES),
        edited(lambda document: document.pop("scheduler")),
        edited(lambda document: document["scheduler"].pop("next_group")),
        edited(lambda document: document["scheduler"]["groups"].pop()),
        edited(lambda document: document["groups"].pop()),
        edited(lambda document: document["groups"][0].update(prompt=None)),
        edited(lambda document: document.update(num_dropped=[[0, 99]])),
        edited(lambda document: document.update(draws=3)),
    ],
)
def test_damaged_files_are_named(saved: Path, damage: Callable[[Path], object]) -> None:
    damage(saved)
    run = Run(stream_settings(1))
    with pytest.raises(CheckpointError, match=rf"{STREAM}: cannot be read .*choose another checkpoint"):
        run.load(saved)
    assert not run.stream.groups and run.stream.scheduler.version == 0


def episode_of(completion: Completion) -> Episode:
    """Return the turns of a response whose even tokens were given."""
    length = len(completion.token_ids)
    turns = (EpisodeTurn("7+6", ({"role": "user", "content": "13"},), 0.25, metrics={"a": 1 / 3}), EpisodeTurn("=13"))
    mask = tuple(position % 2 == 1 for position in range(length))
    failed = "ValueError: no\ud800 mood" if completion.token_ids[0] % 2 else None
    return Episode(
        prompt_ids=(5, 6),
        mask=mask,
        turn_ends=(1, length),
        turns=turns,
        end="failed" if failed else "done",
        failed=failed,
        traceback="line 1",
        num_rewritten=2,
    )


@pytest.fixture
def saved_episodes(tmp_path: Path) -> tuple[Path, Run]:
    """Save a stream in which every second finished response is an episode."""
    run = Run(stream_settings(1, 4))
    run.train()
    run.wait(run.stream.can_change_weights)
    for group in run.stream.groups.values():
        group.completions |= {
            i: replace(one, episode=episode_of(one)) for i, one in group.completions.items() if i % 2 == 0
        }
    run.save(tmp_path / "saved")
    return tmp_path / "saved", run


def test_episodes_are_restored(saved_episodes: tuple[Path, Run]) -> None:
    folder, run = saved_episodes
    resumed = Run(stream_settings(1, 4))
    resumed.load(folder)
    assert contents(resumed) == contents(run)
    episodes = [one.episode for group in resumed.stream.groups.values() for one in group.completions.values()]
    assert None in episodes and {episode.end for episode in episodes if episode} == {"done", "failed"}


@pytest.mark.parametrize("text", ["{", "{}", episode_of(Completion((2,), (0.0,), "stop")).to_json()])
def test_damaged_episodes_are_named(saved_episodes: tuple[Path, Run], text: str) -> None:
    folder, _ = saved_episodes
    table = pq.read_table(folder / SAMPLES)
    texts = [text if one else None for one in table.column("episode").to_pylist()]
    column = table.schema.get_field_index("episode")
    pq.write_table(table.set_column(column, "episode", pa.array(texts, pa.string())), folder / SAMPLES)
    run = Run(stream_settings(1, 4))
    with pytest.raises(CheckpointError, match=rf"{STREAM}: cannot be read .*choose another checkpoint"):
        run.load(folder)


def test_files_of_earlier_versions_have_no_episodes(saved: Path) -> None:
    pq.write_table(pq.read_table(saved / SAMPLES).drop_columns(["episode"]), saved / SAMPLES)
    run = Run(stream_settings(1, 4))
    run.load(saved)
    assert run.stream.groups


@contextmanager
def stage(name: str) -> Iterator[Progress]:
    yield lambda done, total: None


def test_batch_of_a_skipped_update_is_not_saved(tmp_path: Path) -> None:
    """A synchronous step without an update sends no weights, but its batch is trained."""

    class NoWeights:
        def push(self, version: int) -> None: ...

        def restore(self, version: int) -> None: ...

    run = Run(stream_settings(0, 3))
    collector = Collector(run.stream, run.generator, run.rewards, text_of, NoWeights())
    first = collector.collect(1, stage)
    with collector.frozen():
        collector.save(tmp_path)
    assert not (tmp_path / STREAM).exists()
    resumed = Run(stream_settings(0, 3))
    resumed.sampler.load_state_dict(collector.sampler_state())
    again = Collector(resumed.stream, resumed.generator, resumed.rewards, text_of, NoWeights())
    again.load(tmp_path, 1)
    second = [collected.collect(2, stage).rollouts for collected in (collector, again)]
    assert second[0].completions == second[1].completions != first.rollouts.completions
