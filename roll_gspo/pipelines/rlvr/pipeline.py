"""Registry entry of `pipeline: rlvr`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.devices import finds_cuda
from roll_gspo.pipelines.pipeline import Pipeline
from roll_gspo.pipelines.rlvr.plan import context_problems, plan_rows
from roll_gspo.pipelines.rlvr.warnings import rlvr_warnings
from roll_gspo.pipelines.weight_transfer import transfer_problems, transfer_warnings

if TYPE_CHECKING:
    from roll_gspo.pipelines.rlvr.steps import RlvrSteps
    from roll_gspo.pipelines.run_folder import RunFolder
    from roll_gspo.tracking.console import Console


class RlvrPipeline(Pipeline[ExperimentConfig]):
    """Reinforcement learning from verifiable rewards."""

    config_class = ExperimentConfig
    headline = "rollout/score_mean"

    def build(self, config: ExperimentConfig, folder: RunFolder, console: Console) -> RlvrSteps:
        from roll_gspo.pipelines.rlvr.build import build_components
        from roll_gspo.pipelines.rlvr.steps import RlvrSteps

        return RlvrSteps(config, build_components(config, folder, console), console)

    def max_steps(self, config: ExperimentConfig) -> int:
        return config.max_steps

    def length_text(self, config: ExperimentConfig) -> str:
        warmup = f" ({config.critic_warmup} of the critic alone)" if config.critic_warmup else ""
        return f"{config.max_steps} steps{warmup}"

    def plan_rows(self, config: ExperimentConfig) -> Iterable[tuple[str, str]]:
        return plan_rows(config)

    def warnings(self, config: ExperimentConfig) -> Iterable[Problem]:
        return (*rlvr_warnings(config), *transfer_warnings(config, finds_cuda(config)))

    def problems(self, config: ExperimentConfig) -> Iterable[Problem]:
        return (*context_problems(config), *transfer_problems(config, finds_cuda(config)))
