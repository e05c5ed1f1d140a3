from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from composed import load_config

from roll_gspo.checkpoint import MARKER, CheckpointStore
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.resume_changes import changes_since
from roll_gspo.pipelines.run_folder import RunFolder, open_run_folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def config(*overrides: str) -> ExperimentConfig:
    loaded = load_config("example_gspo", "output_dir=out", *overrides).config
    assert isinstance(loaded, ExperimentConfig)
    return loaded


def opened(*overrides: str, **changes: object) -> RunFolder:
    """Open the folder of a composed configuration; `changes` are top-level keys that need no composition."""
    return open_run_folder(config(*overrides).model_copy(update=changes), "the plan")


def _save(folder: RunFolder, step: int) -> Path:
    with CheckpointStore(folder.checkpoints, 0).writing(step) as inside:
        (inside / "config.yaml").write_bytes((folder.path / "config.yaml").read_bytes())
    return folder.checkpoints / f"step_{step:06d}"


def _reseal(step: Path) -> None:
    marker = json.loads((step / MARKER).read_text())
    marker["parts"] = {name: (step / name).stat().st_size for name in marker["parts"]}
    (step / MARKER).write_text(json.dumps(marker))


def test_runs_of_one_second_have_folders_of_their_own() -> None:
    folders = {opened().path for _ in range(3)}
    assert len(folders) == 3 and {path.parent for path in folders} == {Path("out/example_gspo")}


def test_folder_tells_what_was_asked_for() -> None:
    folder = opened("run_name=a", "seed=7")
    assert folder.path == Path("out/example_gspo/a") and folder.resumed_from is None
    assert "seed: 7\n" in (folder.path / "config.yaml").read_text()
    assert (folder.path / "plan.txt").read_text() == "the plan\n"


def test_checkpoints_and_log_go_where_the_configuration_says() -> None:
    elsewhere = ("run_name=a", "checkpoint_config.output_dir=big", "logging_dir=logs")
    folder = opened(*elsewhere)
    assert folder.checkpoints == Path("big/example_gspo/a/checkpoints")
    assert folder.log_folder == Path("logs/example_gspo/a")
    step = _save(folder, 2)
    for resume in ("true", str(step)):
        again = opened(*elsewhere, f"resume_from_checkpoint={resume}")
        assert again.resumed_from is not None and again.resumed_from.folder == step


def test_resume_true_finds_the_newest_run_and_a_path_starts_a_new_one() -> None:
    first, second = opened(run_name="a"), opened(run_name="b")
    step = _save(first, 4)
    _save(second, 2)
    newest = opened("resume_from_checkpoint=true")
    assert newest.path == second.path and newest.resumed_from is not None and newest.resumed_from.step == 2
    fork = opened(f"resume_from_checkpoint={step}", "run_name=c")
    assert fork.path.name == "c" and fork.resumed_from is not None and fork.resumed_from.step == 4


def test_results_are_overwritten_by_no_run_but_their_own() -> None:
    folder = opened(run_name="a")
    step = _save(folder, 1)
    opened(run_name="a")  # nothing is in it yet
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"run_name: out/example_gspo/a holds the results of a run already"):
        opened(run_name="a")
    assert opened("run_name=a", f"resume_from_checkpoint={step}").path == folder.path
    stranger = _save(opened(run_name="b"), 1)
    with pytest.raises(ConfigError, match="choose another run_name"):
        opened("run_name=a", f"resume_from_checkpoint={stranger}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("output_dir=taken", "output_dir"),
        ("checkpoint_config.output_dir=taken", "checkpoint_config.output_dir"),
        ("logging_dir=taken", "logging_dir"),
    ],
)
def test_folder_that_cannot_be_written_is_named_with_its_key(override: str, key: str) -> None:
    Path("taken").touch()
    with pytest.raises(ConfigError, match=rf"^{key}: taken/example_gspo/.* cannot be written .*choose another folder"):
        opened(override)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", "x" * 300, "a\u001bb", "a\udc80"])
def test_names_stay_below_output_dir(name: str) -> None:
    values = config().model_dump(mode="json")
    for key in ("run_name", "exp_name"):
        with pytest.raises(ValueError, match=rf"{key}\n.*expected the name of one folder"):
            ExperimentConfig.model_validate(values | {key: name})


def test_resumed_run_keeps_the_first_files_and_writes_its_own() -> None:
    _save(first := opened(run_name="a"), 4)
    before = (first.path / "config.yaml").read_text()
    for suffix in ("000004", "000004-2"):
        again = opened("run_name=a", "resume_from_checkpoint=true", "max_steps=200")
        assert again.path == first.path and (first.path / "config.yaml").read_text() == before
        assert "max_steps: 200\n" in (first.path / f"config.resume-{suffix}.yaml").read_text()
        assert (first.path / f"plan.resume-{suffix}.txt").is_file()


FREE = (
    *("max_steps=99", "save_steps=7", "track_with=stdout", "logging_steps=9", "tags=[a]", "max_restarts=1"),
    *("actor_train.device_mapping=[0]", "actor_infer.strategy_args.strategy_config.max_num_seqs=8"),
    *("actor_train.training_args.save_hf_model=false", "validation=null", "rewards.column_addition.world_size=3"),
)


def test_resume_may_change_what_leaves_the_numbers_comparable() -> None:
    step = _save(opened(run_name="a"), 4)
    halved = [
        "actor_train.training_args.per_device_train_batch_size=16",
        "actor_train.training_args.gradient_accumulation_steps=4",
    ]
    resumed = opened("run_name=a", "resume_from_checkpoint=true", *FREE, *halved)
    assert resumed.resumed_from is not None and resumed.resumed_from.folder == step
    (note,) = resumed.notes
    assert note.startswith("changed since step 4: max_steps: 80 → 99, ")
    assert "track_with: [tensorboard] → [stdout]" in note and "validation: (not set) → null" in note


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (("seed=7",), ("seed: 42 → 7",)),
        (("strategy=hf",), ("actor_train.strategy_args.strategy_name: megatron_train → hf_train",)),
        (("importance_sampling=token",), ("importance_sampling: seq → token", "pg_clip_low: 0.0003 → 0.2")),
        (("pretrain=/models/mine", "warm_start=null"), ("pretrain: builtin:tiny_qwen3 → /models/mine",)),
        (("actor_train.data_args.num_rows=9",), ("actor_train.data_args.num_rows: null → 9",)),
        (("actor_train.training_args.learning_rate=1",), ("actor_train.training_args.learning_rate: 0.0002 → 1",)),
        (("rewards.column_addition.worker_cls=math_rule",), ("worker_cls: exact_match → math_rule",)),
        (("actor_train.training_args.gradient_accumulation_steps=1",), ("mini-batch of actor_train: 64 → 32",)),
        (("validation.data_args.num_rows=9",), ("validation.data_args.num_rows: null → 9",)),
    ],
)
def test_resume_with_other_numbers_is_refused_unless_asked_for(
    overrides: tuple[str, ...], changes: tuple[str, ...]
) -> None:
    step = _save(opened(run_name="a"), 4)
    for resume in (True, str(step)):
        name = "a" if resume is True else "fork"
        with pytest.raises(ConfigError, match="resume_with_changes=true") as caught:
            opened(*overrides, run_name=name, resume_from_checkpoint=resume)
        assert all(change in str(caught.value) and str(step) in str(caught.value) for change in changes)
        assert not Path("out/example_gspo/fork").exists()
    resumed = opened(*overrides, run_name="a", resume_from_checkpoint=True, resume_with_changes=True)
    assert all(change in resumed.notes[0] for change in changes)


def test_resume_with_changes_needs_a_resume() -> None:
    with pytest.raises(ConfigError, match="resume_with_changes: is used only with resume_from_checkpoint"):
        config("resume_with_changes=true")


def test_configuration_of_another_version_is_compared_by_the_keys_that_both_have() -> None:
    step = _save(opened(run_name="a"), 4)
    document = yaml.safe_load((step / "config.yaml").read_text())
    del document["ppo_epochs"]
    document |= {"renamed_since": 3}
    for seed, count in ((42, 1), (41, 2)):
        (step / "config.yaml").write_text(yaml.safe_dump(document | {"seed": seed}))
        _reseal(step)
        if seed == 42:
            changes = changes_since(step, config("resume_from_checkpoint=true"))
            assert [change.key for change in changes if not change.is_free] == ["renamed_since"][:count]
        else:
            with pytest.raises(ConfigError, match="seed: 41 → 42"):
                opened(run_name="a", resume_from_checkpoint=True)


def test_damaged_checkpoint_is_skipped_with_a_note_or_refused_if_there_is_no_other() -> None:
    folder = opened(run_name="a")
    first, second = _save(folder, 2), _save(folder, 4)
    with (second / "config.yaml").open("a") as file:
        file.write("#")
    size = (first / "config.yaml").stat().st_size
    (note,) = opened(run_name="a", resume_from_checkpoint=True).notes
    assert note == f"damaged checkpoint skipped: {second} (config.yaml has {size + 1} bytes, {size} were written)"
    (first / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=rf"^resume_from_checkpoint: {first} is damaged \(config.yaml is missing\)"):
        opened(run_name="a", resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=rf"{first} is incomplete \(step_000002: config.yaml is missing\)"):
        opened(f"resume_from_checkpoint={first}")


def _holder(pid: int, host: str | None = None, started: int | None = None) -> str:
    facts = {"host": host or socket.gethostname(), "pid": pid, "started": started or 1, "since": "noon"}
    return json.dumps(facts)


def test_folder_of_a_running_process_is_refused(tmp_path: Path) -> None:
    folder = opened(run_name="a")
    other = opened("run_name=b", "checkpoint_config.output_dir=shared")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        started = int(Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19])
        for path, arguments, key in (
            (folder.path, ("run_name=a",), "run_name"),
            (Path("shared/example_gspo/b"), ("output_dir=else", "run_name=b"), "checkpoint_config.output_dir"),
        ):
            (path / ".lock").write_text(_holder(sleeper.pid, started=started))
            with pytest.raises(ConfigError, match=rf"^{key}: process {sleeper.pid} has been writing into {path} since"):
                opened(*arguments, "checkpoint_config.output_dir=shared") if key != "run_name" else opened(*arguments)
        (folder.path / ".lock").write_text(_holder(sleeper.pid, started=started + 1))
        opened(run_name="a").unlock()  # another process had the id before
        assert not (folder.path / ".lock").exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    assert opened("run_name=b", "checkpoint_config.output_dir=shared").path == other.path, "it has ended"


def test_lock_of_another_machine_is_refused_with_its_file() -> None:
    folder = opened(run_name="a")
    (folder.path / ".lock").write_text(_holder(1, host="elsewhere"))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere .*delete out/example_gspo/a/\.lock"):
        opened(run_name="a")
    (folder.path / ".lock").write_text("")  # left by a crash of the machine
    opened(run_name="a")


def test_one_of_two_processes_gets_the_folder(tmp_path: Path) -> None:
    """Processes that start at the same moment; each holds the lock until it is told to end."""
    code = (
        "import sys; from pathlib import Path; from roll_gspo.pipelines.run_lock import lock\n"
        "try: lock(Path('.'), 'run_name'); print('mine', flush=True)\n"
        "except Exception: print('refused', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.stdout.readline().strip() for process in processes if process.stdout)
    for process in processes:
        process.communicate("")
    assert said == ["mine", "refused", "refused"]
