"""Components of a run that every pipeline builds: executor, tokenizer, trained state, output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.checkpoint import CheckpointStore
from roll_gspo.config.data import SourceArgs
from roll_gspo.config.sft import AnyConfig
from roll_gspo.data.prompts import end_of_turn_ids
from roll_gspo.errors import ConfigError
from roll_gspo.execution import EXECUTORS
from roll_gspo.execution.base import Executor
from roll_gspo.models.config_files import CONFIG, end_of_sequence_ids, read_object, text_config
from roll_gspo.models.folder_check import NO_END
from roll_gspo.pipelines.data_sources import chat_format
from roll_gspo.pipelines.output import BackgroundFiles, Output
from roll_gspo.pipelines.placement import execution_settings
from roll_gspo.pipelines.run_folder import RunFolder, config_yaml
from roll_gspo.pipelines.state import ACTOR, RunState
from roll_gspo.pipelines.step_profiler import StepProfiler
from roll_gspo.roles.trained import TrainedPolicy, TrainedRole
from roll_gspo.tracking.base import RunInfo
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.trackers import build_trackers


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """The components that `run_steps` needs; each pipeline adds its own.

    Attributes:
        executor: where the roles live.
        actor_train: the policy that is trained.
        state: the run's progress; a checkpoint holds it.
        output: writes below the run's folder.
        profiler: profiles a window of steps.
        num_steps: training steps of the whole run.
    """

    executor: Executor
    actor_train: TrainedPolicy
    state: RunState[Any]
    output: Output
    profiler: StepProfiler
    num_steps: int

    @property
    def trained_roles(self) -> dict[str, TrainedRole[Any]]:
        """Roles whose state a checkpoint holds, by the name of their folder in it."""
        return {ACTOR: self.actor_train}


def start_executor(config: AnyConfig, console: Console) -> Executor:
    """Start the executor that `execution` selects. It starts the roles."""
    with console.stage("start ray") if config.execution == "ray" else nullcontext():
        return EXECUTORS.load(config.execution)(execution_settings(config))


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer of a checkpoint. Without a padding token it pads with an end-of-sequence token.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or the model has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # arbitrary exceptions of tokenizer code and parsers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{checkpoint}: the tokenizer cannot be loaded ({reason[:300]}); repair its files") from error
    if tokenizer.pad_token_id is None:
        ends = end_of_sequence_ids(checkpoint, tokenizer)
        if not ends:
            raise ConfigError(f"{checkpoint}: {NO_END}")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def check_token_ids(samples: Iterable[Sequence[int]], tokenizer: Any, checkpoint: Path) -> None:
    """Check that every token is in the vocabulary of the model, padding included.

    Raises:
        ConfigError: a token has an id beyond the vocabulary.
    """
    size = text_config(read_object(checkpoint / CONFIG)).get("vocab_size")
    largest = max((max(ids) for ids in samples if ids), default=0)
    largest = max(largest, tokenizer.pad_token_id)
    if isinstance(size, int) and largest >= size:
        raise ConfigError(
            f"{checkpoint}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but "
            f"vocab_size in {CONFIG} is {size}; use the tokenizer of this model, or resize the model's embeddings"
        )


def stop_ids(config: AnyConfig, blocks: Sequence[SourceArgs], tokenizer: Any, checkpoint: Path) -> tuple[int, ...]:
    """Return every id that ends a response: those of the model, and those that end a turn in the data's templates.

    Raises:
        ConfigError: there is none.
    """
    stops = set(end_of_sequence_ids(checkpoint, tokenizer))
    for args in blocks:
        stops |= end_of_turn_ids(tokenizer, chat_format(config, args))
    if not stops:
        raise ConfigError(f"{checkpoint}: {NO_END}")
    return tuple(sorted(stops))


def resume(
    config: AnyConfig,
    folder: RunFolder,
    console: Console,
    roles: Mapping[str, TrainedRole[Any]],
    state: RunState[Any],
    before_load: Callable[[str], None] = lambda name: None,
) -> None:
    """Load the checkpoint to resume from, if there is one.

    Args:
        config, folder, console: the run.
        roles: trained roles by the name of their folder.
        state: the progress of the run.
        before_load: called with the name of a role before it loads its state.
    """
    if folder.resumed_from is None:
        if config.resume_from_checkpoint is True:
            console.warning("resume_from_checkpoint: no complete checkpoint was found; starting from the beginning")
        return
    source = folder.resumed_from.folder
    with console.stage("load checkpoint"):
        for name, role in roles.items():
            before_load(name)
            role.load(source / name)
        state.load(source)
        keep = config.checkpoint_config
        if state.best is not None and (state.best.metric, state.best.mode) != (keep.keep_best, keep.keep_best_mode):
            state.best = None  # the metric of `keep_best` has changed
    console.message(f"resumed after step {state.step} from {source}")
    for note in folder.notes:
        console.warning(note)


def make_output(
    config: AnyConfig,
    folder: RunFolder,
    console: Console,
    state: RunState[Any],
    files: BackgroundFiles | None = None,
) -> Output:
    """Build the writer of the run's folder, after `resume`. Metrics of steps that will be repeated are dropped."""
    run = RunInfo(
        folder=folder.path,
        name=folder.path.name,
        experiment=config.exp_name,
        first_step=state.first_logged_step,
        tags=config.tags,
        config=config.model_dump(mode="json", exclude={"system_envs"}),  # environment variables may be secrets
    )
    checkpoints = CheckpointStore(folder.checkpoints, config.checkpoint_config.max_ckpt_to_keep, state.best)
    state.best = checkpoints.best  # the best checkpoint of another folder is not kept here
    return Output(
        folder=folder.path,
        checkpoints=checkpoints,
        trackers=build_trackers(config.track_with, run, config.tracker_options),
        console=console,
        config_text=config_yaml(config),
        save_hf_model=config.actor_train.training_args.save_hf_model,
        asynchronous=config.checkpoint_config.async_save,
        files=files,
    )
