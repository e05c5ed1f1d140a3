"""`python -m roll_gspo.export`: convert a checkpoint to Hugging Face layout."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome
from ranks import Ranks
from safetensors.torch import load_file
from state_cases import Layout, converted

import roll_gspo.export
from roll_gspo.checkpoint import CheckpointStore

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
Export = Callable[..., tuple[int, str, str]]
ARGUMENTS = ("--config-name", "example_gspo", "strategy=hf", "run_name=run")
TRAINER = "actor_train.strategy_args.strategy_name="
MEGATRON = f"{TRAINER}megatron_train"
RUN = Path("out/example_gspo/run")
WEIGHTS = "model.safetensors"


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Export:
    """Run the command in this process; return (status, out, err)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        capfd.readouterr()
        code = roll_gspo.export.main()
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "engine",
    ["hf", pytest.param("fsdp2", marks=pytest.mark.long), pytest.param("megatron", marks=pytest.mark.megatron)],
)
def test_exported_folder_equals_the_export_of_the_run(
    command: Command, small: tuple[str, ...], export: Export, engine: str
) -> None:
    """Compare with `actor_train_hf`, which the training wrote, for every engine."""
    assert command(*ARGUMENTS, *small, "max_steps=1", f"{TRAINER}{engine}_train").code == 0
    code, out, err = export(RUN, "exported")
    assert (code, err) == (0, "")
    assert "exported: log-probabilities as trained (largest difference " in out
    trained = RUN / "checkpoints/step_000001/actor_train_hf"
    want, got = load_file(trained / WEIGHTS), load_file(Path("exported") / WEIGHTS)
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert {p.name for p in Path("exported").iterdir()} == {p.name for p in trained.iterdir()}
    assert [p for p in Path().iterdir() if p.name.endswith(".tmp")] == []
    code, _, err = export(RUN, "exported")
    assert code == 2 and "OUT: exported exists already" in err


@pytest.mark.megatron
def test_export_reads_a_checkpoint_of_two_ranks_and_reports_errors(
    command: Command,
    small: tuple[str, ...],
    pretrained: Path,
    export: Export,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command(*ARGUMENTS, *small, "max_steps=1", MEGATRON).code == 0
    first = RUN / "checkpoints/step_000001"
    _write_again_by_two_ranks(first, pretrained, ranks, {"tensor_model_parallel_size": 2})
    code, _, err = export("two", "of_two")
    assert code == 0, err
    assert (Path("of_two") / WEIGHTS).read_bytes() == (first / "actor_train_hf" / WEIGHTS).read_bytes()

    monkeypatch.setitem(roll_gspo.export.TOLERANCE, "fp32", 0.0)
    code, _, err = export("two", "different")
    assert code == 1 and "different: transformers computes other log-probabilities than the training engine" in err
    assert not list(Path().glob("*different*"))

    code, _, err = export("two", "out_of_nothing", "--model", "builtin:tiny_qwen3_moe")
    assert code == 1 and "parameters of another model" in err
    code, _, err = export("nowhere", "out_of_nothing")
    assert code == 1 and err.startswith("CHECKPOINT: nowhere does not exist; give")
    with CheckpointStore(Path("bare/checkpoints"), 0).writing(1) as folder:
        (folder / "state.json").write_text("{}")
    code, _, err = export("bare", "out_of_nothing")
    assert code == 1 and "config.yaml: cannot be read (No such file or directory)" in err
    for planted in (b"!!python/object/apply:os.mkdir [touched]", b"\x80\x04N.", b"- a list"):
        (config := Path("bare/checkpoints/step_000001/config.yaml")).write_bytes(planted)
        code, _, err = export("bare", "out_of_nothing")
        assert code == 2 and err.startswith(f"{config}: is not a configuration of this version")
    assert not Path("out_of_nothing").exists() and not Path("touched").exists()


def _write_again_by_two_ranks(first: Path, model: Path, ranks: Ranks, layout: Layout) -> None:
    """Write a copy of a checkpoint to the run `two`, whose training state is that of two ranks."""
    with CheckpointStore(Path("two/checkpoints"), 0).writing(1) as folder:
        shutil.copyfile(first / "config.yaml", folder / "config.yaml")
        state, target = (path.resolve() for path in (first / "actor_train", folder / "actor_train"))
        ranks.run(2, converted, model, layout, state, target)
    assert len(list(Path("two").rglob("*.distcp"))) == 2


def test_export_reads_a_checkpoint_of_two_ranks_of_fsdp2(
    command: Command, small: tuple[str, ...], pretrained: Path, export: Export, ranks: Ranks
) -> None:
    assert command(*ARGUMENTS, *small, "max_steps=1", f"{TRAINER}fsdp2_train").code == 0
    first = RUN / "checkpoints/step_000001"
    _write_again_by_two_ranks(first, pretrained, ranks, {"engine": "fsdp2"})
    code, _, err = export("two", "of_two")
    assert code == 0, err
    assert (Path("of_two") / WEIGHTS).read_bytes() == (first / "actor_train_hf" / WEIGHTS).read_bytes()
    code, _, err = export("two", "out_of_nothing", "--model", "builtin:tiny_qwen3_moe")
    assert code == 1 and "parameters of another model" in err and not Path("out_of_nothing").exists()
