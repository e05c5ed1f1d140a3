"""Registry entry of `pipeline: sft`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from roll_gspo.config.base import Problem
from roll_gspo.config.sft import SftConfig
from roll_gspo.models.size import context_length_of
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.pipeline import Pipeline, mini_batch_text

if TYPE_CHECKING:
    from roll_gspo.pipelines.run_folder import RunFolder
    from roll_gspo.pipelines.sft.steps import SftSteps
    from roll_gspo.tracking.console import Console


class SftPipeline(Pipeline[SftConfig]):
    """Supervised fine-tuning on conversations."""

    config_class = SftConfig
    headline = "sft/loss"

    def build(self, config: SftConfig, folder: RunFolder, console: Console) -> SftSteps:
        from roll_gspo.pipelines.sft.build import build_components
        from roll_gspo.pipelines.sft.steps import SftSteps

        return SftSteps(config, build_components(config, folder, console), console)

    def max_steps(self, config: SftConfig) -> int | None:
        return config.max_steps

    def length_text(self, config: SftConfig) -> str:
        steps = f"{config.max_steps} steps" if config.max_steps is not None else ""
        epochs = f"{config.num_epochs} pass(es) over the data" if config.num_epochs is not None else ""
        return f"{steps} or {epochs}, whichever is over first" if steps and epochs else steps or epochs

    def plan_rows(self, config: SftConfig) -> Iterable[tuple[str, str]]:
        data = config.actor_train.data_args
        turns = "the last turn" if data.multi_turn == "separate" else "all assistant's turns"
        rows = f" (the first {data.num_rows})" if data.num_rows else ""
        return (
            ("data", f"{', '.join(data.file_name)}{rows}; sequences ≤ {config.sequence_length} tokens"),
            ("updates", f"a step is one optimizer step: {mini_batch_text(config)}"),
            ("loss", f"negative log-likelihood, mean over the tokens of {turns} of a sequence"),
        )

    def problems(self, config: SftConfig) -> Iterable[Problem]:
        name = model_of(config, config.actor_train)
        context = context_length_of(name)
        if context is not None and config.sequence_length > context:
            yield Problem(
                "sequence_length",
                f"{config.sequence_length} tokens, but the context of {name} has {context}; lower it to that (longer "
                "conversations are dropped)",
            )
