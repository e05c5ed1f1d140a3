from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from roll_gspo.checkpoint import (
    MARKER,
    BackgroundWrite,
    Best,
    CheckpointStore,
    complete_checkpoints,
    is_complete,
    newest_checkpoint,
    open_checkpoint,
    read_best,
)
from roll_gspo.errors import CheckpointError


def write(store: CheckpointStore, step: int, text: str = "state") -> Path:
    with store.writing(step) as folder:
        (folder / "actor").mkdir()
        (folder / "actor/weights").write_text(text)
    return store.folder / f"step_{step:06d}"


def test_checkpoint_appears_when_it_is_complete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", max_to_keep=0)
    with store.writing(3) as folder:
        (folder / "weights").write_text("w")
        assert complete_checkpoints(store.folder) == []
    (found,) = complete_checkpoints(store.folder)
    assert (found.step, (found.folder / "weights").read_text()) == (3, "w")


def test_error_while_writing_keeps_only_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=1)
    write(store, 1)
    with pytest.raises(CheckpointError, match=r"step_000002: cannot be written \(disk full\)"), store.writing(2):
        raise OSError("disk full")
    with pytest.raises(KeyboardInterrupt), store.writing(2):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_checkpoint_filled_in_steps_counts_once_complete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=1)
    write(store, 1)
    folder = store.begin(2)
    with store.filling(2):
        (folder / "state").write_text("s")
    with store.filling(2):
        (folder / "weights").write_text("w")
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1]
    store.complete(2)
    (found,) = complete_checkpoints(tmp_path)
    assert (found.step, (found.folder / "weights").read_text()) == (2, "w")
    folder = store.begin(3)
    with pytest.raises(CheckpointError, match="step_000003: cannot be written"), store.filling(3):
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]


def test_background_write_raises_its_error_in_wait() -> None:
    may_end = threading.Event()
    write = BackgroundWrite(lambda: None if may_end.wait(10) else pytest.fail("not released"))
    assert not write.done
    may_end.set()
    write.wait()
    assert write.done
    failing = BackgroundWrite(lambda: Path("/nowhere/file").write_text("x") and None)
    with pytest.raises(FileNotFoundError):
        failing.wait()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=2)
    for step in (5, 10, 15):
        write(store, step)
    assert [c.step for c in complete_checkpoints(tmp_path)] == [10, 15]


def test_resume_from_an_earlier_step_keeps_the_new_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(CheckpointStore(tmp_path, max_to_keep=0), step)
    write(CheckpointStore(tmp_path, max_to_keep=2), 15)
    assert [c.step for c in complete_checkpoints(tmp_path)] == [10, 15]


def test_step_saved_again_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=0)
    write(store, 1, "old")
    assert (write(store, 1, "new") / "actor/weights").read_text() == "new"


@pytest.mark.parametrize("damage", ["no marker", "part missing", "part cut short", "marker torn", "marker foreign"])
def test_damaged_checkpoint_is_not_complete(tmp_path: Path, damage: str) -> None:
    folder = write(CheckpointStore(tmp_path, max_to_keep=0), 1)
    assert is_complete(folder)
    marker, part = folder / MARKER, folder / "actor/weights"
    match damage:
        case "no marker":
            marker.unlink()
        case "part missing":
            part.unlink()
        case "part cut short":
            part.write_text("sta")
        case "marker torn":
            marker.write_text(marker.read_text()[:20])
        case "marker foreign":
            marker.write_text(json.dumps([1]))
    assert not is_complete(folder)
    with pytest.raises(CheckpointError, match="is incomplete"):
        open_checkpoint(folder)


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step_000002.123.tmp"
    leftover.mkdir()
    (leftover / "weights").write_text("half")
    assert complete_checkpoints(tmp_path) == []
    write(CheckpointStore(tmp_path, max_to_keep=0), 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_newest_of_an_experiment_is_the_last_completed(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path / "b/checkpoints", max_to_keep=0), 9)
    write(CheckpointStore(tmp_path / "a/checkpoints", max_to_keep=0), 4)
    newest = newest_checkpoint(tmp_path, None)
    assert newest is not None and (newest.step, newest.folder.parents[1].name) == (4, "a")
    named = newest_checkpoint(tmp_path, "b")
    assert named is not None and named.step == 9
    assert newest_checkpoint(tmp_path / "nothing", None) is None


def test_newest_is_found_in_a_copy_and_after_a_resume_from_an_earlier_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run/checkpoints", max_to_keep=0)
    for step in (10, 20, 15):
        write(store, step)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, copy_function=shutil.copyfile)
    os.utime(copy / "checkpoints/step_000010" / MARKER)
    newest = newest_checkpoint(tmp_path, "copy")
    assert newest is not None and newest.step == 15
    assert open_checkpoint(copy).step == 15


def test_path_of_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", max_to_keep=0)
    write(store, 1)
    write(store, 2)
    assert open_checkpoint(tmp_path).step == open_checkpoint(store.folder).step == 2
    assert open_checkpoint(store.folder / "step_000001").step == 1
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "elsewhere")


def best(step: int) -> Best:
    return Best(step, "validation/score_mean", "max", 0.1 * step)


def steps(folder: Path) -> list[int]:
    return [c.step for c in complete_checkpoints(folder)]


def test_best_checkpoint_is_kept_until_a_better_one_exists(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=1)
    for step, now in ((1, best(1)), (2, best(2)), (3, best(2)), (4, best(2))):
        with store.writing(step, now) as folder:
            (folder / "weights").write_text("w")
    assert steps(tmp_path) == [2, 4] and read_best(tmp_path) == best(2)
    assert open_checkpoint(tmp_path / "best.json").step == 2 and open_checkpoint(tmp_path).step == 4
    with store.writing(5, best(5)) as folder:
        (folder / "weights").write_text("w")
    assert steps(tmp_path) == [5] and read_best(tmp_path) == best(5)


def test_kill_between_a_checkpoint_and_its_mark_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=1)
    write(store, 1)
    with store.writing(2, best(2)) as folder:
        (folder / "weights").write_text("w")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), store.writing(3, best(3)) as folder:
        (folder / "weights").write_text("w")
    monkeypatch.undo()
    assert steps(tmp_path) == [2, 3] and read_best(tmp_path) == best(2), "the mark is whole, and nothing is deleted"
    store = CheckpointStore(tmp_path, max_to_keep=1, best=best(3))  # read from the state of the checkpoint
    assert read_best(tmp_path) == best(3)
    write(store, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.json", "step_000003", "step_000004"]


def test_best_of_another_folder_or_attempt_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("torn")
    assert read_best(tmp_path) is None
    store = CheckpointStore(tmp_path, max_to_keep=1, best=best(7))
    assert store.best is None and not (tmp_path / "best.json").exists()
