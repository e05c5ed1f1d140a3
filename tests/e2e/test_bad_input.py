"""Invalid input: a clear message, no traceback, the documented exit status, and no lost data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of, spawn

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUN = Path("out/example_gspo/run")
FILE = "actor_train.data_args.file_name"
REWARD = "rewards.column_addition.worker_cls"


def _refused(outcome: Outcome, *texts: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for text in texts:
        assert text in outcome.err


def _rows(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 14) for b in range(20, 24)]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ((f"{FILE}=nowhere.jsonl",), (f"{FILE}: nowhere.jsonl cannot be read (no such file)",)),
        (("pretrain=builtin:tiny_qwen",), ("unknown builtin model 'tiny_qwen'; did you mean 'tiny_qwen3'?",)),
        (("pretrain=./nowhere",), ("pretrain: no folder './nowhere'",)),
        (("pretrain=empty",), ("pretrain: empty has no config.json",)),
        (("pretrain=cut",), ("cut/model.safetensors: cannot be read as safetensors",)),
    ],
    ids=["data file", "builtin", "folder", "empty folder", "damaged weights"],
)
def test_missing_input_is_reported_before_heavy_imports(
    workplace: Path, small: tuple[str, ...], arguments: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "cut").mkdir()
    (workplace / "cut/config.json").write_text('{"model_type": "qwen3"}')
    (workplace / "cut/model.safetensors").write_bytes(b"cut")
    heavy = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    (workplace / "sitecustomize.py").write_text(heavy)
    outcome = spawn(*HF, *small, *arguments, folder=workplace, env={"PYTHONPATH": _paths(workplace)})
    _refused(outcome, *texts, "roll_gspo: 1 problem in the ")
    assert outcome.err.splitlines()[-1] == "False", "torch was imported"
    assert not (workplace / "out").exists()


def _paths(*folders: Path) -> str:
    return ":".join(map(str, (*folders, Path(__file__).parents[2])))


@pytest.mark.parametrize(("engine", "package"), [("vllm", "vllm"), ("megatron", "megatron.core")])
def test_missing_engine_names_its_pip_command(
    workplace: Path, small: tuple[str, ...], engine: str, package: str
) -> None:
    shim = f"""
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "{engine}":
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Hide())
    """
    (workplace / "sitecustomize.py").write_text("\n".join(line[8:] for line in shim.splitlines()))
    arguments = ("--config-name", "example_gspo", *small)
    outcome = spawn(*arguments, folder=workplace, env={"PYTHONPATH": _paths(workplace)})
    _refused(outcome, f"needs the package '{package}': pip install 'roll-gspo[{engine}]'", "or strategy=hf")
    assert spawn(*arguments, "strategy=hf", "--dry-run", folder=workplace).code == 0


def test_malformed_row_names_file_and_line_or_is_skipped(command: Command, small: tuple[str, ...]) -> None:
    _rows(Path("rows.jsonl"), GOOD[0], '{"question": "1+1=", "answ', *GOOD[1:])
    arguments = (*HF, *small, f"{FILE}=rows.jsonl", "run_name=run")
    _refused(command(*arguments), "1 problem in the data", "rows.jsonl:2: not valid JSON", "on_bad_row: skip")
    outcome = command(*arguments, "max_steps=1", "actor_train.data_args.on_bad_row=skip")
    assert outcome.code == 0 and "skipped 1 malformed rows, first: rows.jsonl:2" in outcome.out


@pytest.mark.parametrize(
    ("rows", "arguments", "text"),
    [
        ([], (), "rows.jsonl has no usable row"),
        (GOOD, ("prompt_length=4",), "every prompt is longer than prompt_length 4"),
        ([{**GOOD[0], "domain": "poetry"}], (), "domain 'poetry' and tag ''"),
    ],
    ids=["empty", "too long", "no reward"],
)
def test_unusable_data_is_reported(
    command: Command, small: tuple[str, ...], rows: list[object], arguments: tuple[str, ...], text: str
) -> None:
    _rows(Path("rows.jsonl"), *rows)
    _refused(command(*HF, *small, f"{FILE}=rows.jsonl", *arguments), "1 problem in the data", text)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no_such_module.f", "no module 'no_such_module'"),
        ("my_reward.no_such_function", "module 'my_reward' has no 'no_such_function'"),
    ],
)
def test_reward_that_cannot_be_imported_fails_before_the_model_is_built(
    command: Command, small: tuple[str, ...], target: str, text: str
) -> None:
    arguments = [a for a in small if not a.startswith(("pretrain=", "warm_start="))]
    outcome = command(*HF, *arguments, f"{REWARD}={target}")
    _refused(outcome, "rewards.column_addition", text)
    assert "warm start:" not in outcome.out and not Path("out/pretrained").exists()


@pytest.mark.parametrize(
    ("name", "text", "all_fail"),
    [
        ("raises", "ValueError: no opinion", True),
        ("hangs", "timeout after 1 s", False),
        ("not_a_number", "returned nan, not a finite number", False),
    ],
)
def test_failing_reward_is_counted_and_the_run_continues(
    command: Command, small: tuple[str, ...], name: str, text: str, all_fail: bool
) -> None:
    sizes = (
        "rollout_batch_size=2",
        "max_steps=1",
        "run_name=run",
        "validation=null",
        "rewards.column_addition.world_size=8",
    )
    small = tuple(size for size in small if not size.startswith("validation."))
    outcome = command(*HF, *small, *sizes, f"{REWARD}=my_reward.{name}", "rewards.column_addition.timeout_s=1.0")
    assert outcome.code == 0, outcome.err
    assert text in outcome.out and "samples failed, first (row " in outcome.out
    failed = metrics_of(RUN)[0]["reward/failed"]
    assert failed == 8 if all_fail else 0 < failed < 8


def test_output_dir_that_is_a_file(command: Command, small: tuple[str, ...]) -> None:
    Path("taken").write_text("")
    _refused(command(*HF, *small, "output_dir=taken"), "output_dir: taken/example_gspo", "choose another folder")


def test_resume_from_a_missing_or_incomplete_checkpoint(command: Command, small: tuple[str, ...]) -> None:
    resume = "resume_from_checkpoint"
    _refused(command(*HF, *small, f"{resume}=gone/step_000002"), f"{resume}: gone/step_000002 does not exist")
    torn = Path("torn/step_000002")
    torn.mkdir(parents=True)
    (torn / "COMPLETE.json").write_text('{"step": 2, "parts": {"state.json": 10}}')
    _refused(command(*HF, *small, f"{resume}={torn}"), f"{resume}: {torn} is incomplete")


def test_resume_with_another_model_engine_or_data(command: Command, small: tuple[str, ...], pretrained: Path) -> None:
    assert command(*HF, *small, "run_name=run", "max_steps=1").code == 0
    resume = (*HF, *small, "run_name=other", f"resume_from_checkpoint={RUN}")
    (engine := RUN / "checkpoints/step_000001/actor_train/hf_train.pt").rename("hf_train.pt")
    _refused(command(*resume), "is incomplete")
    Path("hf_train.pt").rename(engine)
    model = ("model=tiny_qwen3_moe", "pretrain=builtin:tiny_qwen3_moe")
    for change in (("actor_train.data_args.num_rows=10",), model, ("seed=7",)):
        _refused(command(*resume, *change), f"{change[-1].partition('=')[0]}: ", "set resume_with_changes=true")
    other_data = command(*resume, "actor_train.data_args.num_rows=10", "resume_with_changes=true")
    _refused(other_data, "the data has 10 prompts, but the checkpoint's had 128", code=1)
    other_model = command(*resume, *model, "resume_with_changes=true")
    _refused(other_model, "parameters of another model", code=1)


def test_unavailable_model_on_the_hub(
    command: Command, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _refused(command(*HF, *small, "pretrain=nobody/no-model"), "pretrain: 'nobody/no-model' is neither a local folder")
