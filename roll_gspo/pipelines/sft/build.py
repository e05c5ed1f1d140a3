"""Build the components of a supervised run from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.config.sft import SftConfig, SftDataArgs
from roll_gspo.data import column_addition, multi_domain
from roll_gspo.data.conversations import (
    ChatSample,
    ChatSamples,
    Conversation,
    generate_conversations,
    make_samples,
    read_conversations,
)
from roll_gspo.data.messages import Columns
from roll_gspo.data.rows import ReadOptions
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.components import (
    RunComponents,
    check_token_ids,
    load_tokenizer,
    make_output,
    resume,
    start_executor,
    stop_ids,
)
from roll_gspo.pipelines.data_sources import (
    DATA_SEED,
    NUM_GENERATED_ROWS,
    builtin_task,
    chat_format,
    check_tags,
    fingerprint,
)
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.factories import make_sft_actor
from roll_gspo.pipelines.placement import placement_of
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.run_folder import RunFolder
from roll_gspo.pipelines.state import ACTOR, RunState
from roll_gspo.pipelines.step_profiler import StepProfiler
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.tracking.console import Console

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SftComponents(RunComponents):
    """The components of `SftSteps`.

    Attributes:
        validation: the held-out sequences.
        pad_token_id: token that pads batches.
        num_dropped: number of training sequences longer than `sequence_length`.
    """

    actor_train: SftActor
    state: RunState[ChatSample]
    validation: tuple[ChatSample, ...]
    pad_token_id: int
    num_dropped: int


def build_components(config: SftConfig, folder: RunFolder, console: Console) -> SftComponents:
    """Read the data, prepare the model, start it, and load the checkpoint to resume from.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: the model or the engine does not allow a setting.
    """
    with console.stage("read data"):
        train = read_data(config.actor_train.data_args, "actor_train.data_args.file_name", "train")
        held_out: list[Conversation] = []
        if config.validation is not None:
            held_out = read_data(config.validation.data_args, "validation.data_args.file_name", "validation")
        check_tags(config, {row.tag for row in (*train, *held_out)})
    checkpoint = prepare_checkpoint(config, model_of(config, config.actor_train), console)
    with console.stage("tokenize conversations"):
        tokenizer = load_tokenizer(checkpoint)
        samples = _tokenized(config, config.actor_train.data_args, train, tokenizer)
        validation: tuple[ChatSample, ...] = ()
        if config.validation is not None:
            validation = _tokenized(config, config.validation.data_args, held_out, tokenizer).samples
        whole = ((*sample.prompt_ids, *sample.response_ids) for sample in (*samples.samples, *validation))
        check_token_ids(whole, tokenizer, checkpoint)
        _check_ends(config, samples, tokenizer, checkpoint)
    num_steps = config.num_steps(len(samples.samples))
    epochs = num_steps * config.mini_batch_size / len(samples.samples)
    console.message(f"{len(samples.samples)} sequences, {num_steps} steps: {epochs:.2g} pass(es)")
    executor = start_executor(config, console)
    try:
        make = partial(make_sft_actor, config, checkpoint, num_steps)
        with console.stage("start actor_train"):
            actor = placement_of(config, executor).start("actor_train", config.actor_train, make)
        tokens = (ids for sample in samples.samples for ids in (sample.prompt_ids, sample.response_ids, sample.mask))
        state = RunState(0, PromptSampler(samples.samples, config.seed, fingerprint(tokens)))
        resume(config, folder, console, {ACTOR: actor}, state)
    except BaseException:
        executor.close()
        raise
    return SftComponents(
        executor=executor,
        actor_train=actor,
        state=state,
        output=make_output(config, folder, console, state),
        profiler=StepProfiler(config, folder.path, {"actor_train": actor}),
        validation=validation,
        pad_token_id=tokenizer.pad_token_id,
        num_steps=num_steps,
        num_dropped=samples.num_dropped,
    )


def sequences_of(samples: Sequence[ChatSample], pad_token_id: int) -> tuple[Sequences, Tensor]:
    """Return one batch of all samples, and the row [B] of each."""
    sequences = Sequences.collate(
        [sample.prompt_ids for sample in samples],
        [sample.response_ids for sample in samples],
        pad_token_id,
        [sample.mask for sample in samples],
    )
    return sequences, torch.tensor([sample.row for sample in samples])


def read_data(args: SftDataArgs, where: str, split: str) -> list[Conversation]:
    """Read or generate the conversations of a `data_args` block.

    Args:
        args: files and columns.
        where: YAML key of the files, for error messages.
        split: `train` or `validation`, for generated conversations.

    Raises:
        DataError: names the YAML key, the file and the line.
    """
    task = builtin_task(args, where)
    if task == column_addition.FILE_NAME:
        return generate_conversations(args.num_rows or NUM_GENERATED_ROWS[split], DATA_SEED, split)
    if task == multi_domain.FILE_NAME:
        return read_conversations(multi_domain.files(split), where)[: args.num_rows]
    reading = ReadOptions(Columns(args.messages, args.prompt, tag=args.tag), args.dataset_config, args.split)
    return read_conversations(args.file_name, where, args.on_bad_row, reading)[: args.num_rows]


def _tokenized(config: SftConfig, args: SftDataArgs, rows: list[Conversation], tokenizer: Any) -> ChatSamples:
    return make_samples(
        rows,
        tokenizer,
        config.sequence_length,
        ", ".join(args.file_name),
        chat_format(config, args),
        separate_turns=args.multi_turn == "separate",
    )


def _check_ends(config: SftConfig, samples: ChatSamples, tokenizer: Any, checkpoint: Path) -> None:
    """Warn if the model cannot learn to stop: turns have no end token, or generation does not stop at it."""
    stops = stop_ids(config, [config.actor_train.data_args], tokenizer, checkpoint)
    if not samples.end_token_ids:
        logger.warning(
            "the chat template ends the assistant's turns with no special token, so that the model will not learn to "
            "stop; end them with %s in chat_template",
            " or ".join(tokenizer.convert_ids_to_tokens(list(stops))),
        )
    elif not samples.end_token_ids & set(stops):
        ends = ", ".join(tokenizer.convert_ids_to_tokens(sorted(samples.end_token_ids)))
        logger.warning(
            "the assistant's turns end with %s, at which generation does not stop (it does at %s): set eos_token in "
            "tokenizer_config.json, or add the id to eos_token_id in generation_config.json of the model",
            ends,
            ", ".join(tokenizer.convert_ids_to_tokens(list(stops))),
        )
