"""Export the policy of a checkpoint as a Hugging Face folder: `python -m roll_gspo.export CHECKPOINT OUT [--adapter]`.

One process reads the state of `actor_train` from any layout and writes config, safetensors and tokenizer. It then
loads the folder with transformers and compares log-probs of fixed token sequences with the training engine. OUT is
created only if they agree. An adapter is merged into the weights; with `--adapter`, OUT is the adapter in the layout of
peft.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from roll_gspo.checkpoint import open_checkpoint
from roll_gspo.config.pipelines import config_class
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import CheckpointError, ConfigError, RollGspoError
from roll_gspo.printable import printable

if TYPE_CHECKING:
    import torch

    from roll_gspo.strategies.base import AdapterStrategy, ModelSetup, TrainedModel

NUM_SEQUENCES, PROMPT_LENGTH, RESPONSE_LENGTH = 4, 8, 24
# Maximum log-prob difference in nats. It allows rounding of sums and of bfloat16 weights and activations.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def export(checkpoint: Path, out: Path, model: str | None = None, *, adapter: bool = False) -> float:
    """Write the policy of a checkpoint in Hugging Face layout and verify it.

    Args:
        checkpoint: folder of a checkpoint, or of a run (its newest checkpoint).
        out: folder of the export; must not exist.
        model: model that gives architecture and tokenizer, like `pretrain`; None selects the run's model.
        adapter: write the adapter alone instead of a whole model.

    Returns:
        The largest difference between log-probabilities of transformers and of the training engine, in nats.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or from another model, or the export computes different
            log-probs.
        ConfigError: the run's configuration or model cannot be used here, or `out` exists.
    """
    from roll_gspo.pipelines.pretrain import prepare_checkpoint
    from roll_gspo.pipelines.state import ACTOR
    from roll_gspo.tracking.console import Console

    if out.exists():
        raise ConfigError(f"OUT: {out} exists already; remove it or choose another folder")
    folder = open_checkpoint(checkpoint, "CHECKPOINT").folder
    config = _config(folder)
    if adapter and config.actor_train.model_args.lora is None:
        raise ConfigError(f"--adapter: {folder} was trained without actor_train.model_args.lora; omit the option")
    name = model or config.actor_train.model_args.model_name_or_path or config.pretrain
    with tempfile.TemporaryDirectory() as logs, Console("export", 1, Path(logs)) as console:
        source = prepare_checkpoint(config, name, console)
    trained = _trained(config, source, folder / ACTOR)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        if adapter:
            _with_adapter(trained).save_adapter(aside)
        else:
            trained.save_hf(aside)
        difference = _difference(trained, aside, _setup(config, source).dtype, base=source if adapter else None)
        tolerance = TOLERANCE[config.actor_train.model_args.dtype]
        if not difference <= tolerance:  # also rejects NaN
            raise CheckpointError(
                f"{out}: transformers computes other log-probabilities than the training engine (largest difference "
                f"{difference:.3g} nats, {tolerance:g} are rounding); nothing was exported: please report this"
            )
        aside.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference


def _config(folder: Path) -> AnyConfig:
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no mapping of keys")
        return config_class(values).model_validate(values)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a checkpoint of a run") from error
    except (ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: is not a configuration of this version ({first}); use the one that wrote it"
        ) from error


def _setup(config: AnyConfig, source: Path) -> ModelSetup:
    from roll_gspo.pipelines.settings import lora_setup, model_setup

    role = config.actor_train
    setup = model_setup(config, source, role.model_args.dtype, NUM_SEQUENCES)
    return dataclasses.replace(setup, temperature=1.0, lora=lora_setup(config))


def _trained(config: AnyConfig, source: Path, folder: Path) -> TrainedModel:
    from roll_gspo.pipelines.settings import optimizer_setup

    role = config.actor_train
    optimizer = optimizer_setup(config, role.training_args, total_steps=1)  # no optimizer step is taken
    return role.strategy_args.load_trained(_setup(config, source), optimizer, folder)


def _with_adapter(trained: TrainedModel) -> AdapterStrategy:
    from roll_gspo.strategies.base import AdapterStrategy

    if not isinstance(trained, AdapterStrategy):
        raise TypeError(f"{type(trained).__name__}: supports_lora needs an AdapterStrategy")
    return trained


def _difference(trained: TrainedModel, exported: Path, dtype: torch.dtype, base: Path | None) -> float:
    """Return the largest log-prob difference between the engine and transformers on the same tokens.

    Args:
        trained: the engine.
        exported: the exported model, or the adapter of `base`.
        dtype: dtype of the model.
        base: model of the adapter; None if `exported` is a whole model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from roll_gspo.batch import Sequences

    model = AutoModelForCausalLM.from_pretrained(base or exported, dtype=dtype).eval()
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, exported).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES, PROMPT_LENGTH + RESPONSE_LENGTH)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, PROMPT_LENGTH - 1 : -1]
    responses = tokens[:, PROMPT_LENGTH:]
    theirs = logits.float().log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    ours = trained.score(Sequences.collate(tokens[:, :PROMPT_LENGTH].tolist(), responses.tolist(), pad=0)).log_probs
    return float((ours - theirs).abs().max())


def main() -> int:
    """Export and print the largest difference. Return 2 if the input must be fixed, 1 if the export failed."""
    parser = argparse.ArgumentParser(
        prog="python -m roll_gspo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_000020, or RUN for its newest")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--model", help="folder or name of the model that training started from, where the run's `pretrain` has moved"
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, as peft loads it")
    arguments = parser.parse_args()
    try:
        difference = export(arguments.checkpoint, arguments.out, arguments.model, adapter=arguments.adapter)
    except RollGspoError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{arguments.out}: log-probabilities as trained (largest difference {difference:.2g} nats)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
