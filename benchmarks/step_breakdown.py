"""Time the stages of a training step and compare them with the same work on bare engines.

    python benchmarks/step_breakdown.py [--config-name example_gspo] [--rounds 9] [key=value ...]

"Bare" is a script without this framework, in the same process, on the same engine, model and batch: `LLM.generate`;
megatron's `GPTModel`, DDP and optimizer in a plain loop over mini- and micro-batches of the same size with a minimal
GSPO loss; the reward function called directly; weights transferred by vLLM's own reload. It has no logs, metrics,
files or checks. Each round runs one step of both kinds from the same weights on the same prompts and seeds, in
alternating order. The first round is not counted.

The table shows wall time and CPU time (of this process, all threads). CPU time is more reliable on a busy machine. It
excludes the reward workers, which are separate processes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra import compose, initialize
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import open_dict

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.run import ShippedConfigs, hydra_arguments, load_composed, set_environment
from roll_gspo.tracking.timing import StageTimer

if TYPE_CHECKING:
    from bare_step import BareStep

    from roll_gspo.pipelines.rlvr.build import RlvrComponents
    from roll_gspo.pipelines.rlvr.steps import RlvrSteps
    from roll_gspo.strategies.base import WeightSource

ENGINES = {"actor_train": "megatron_train", "actor_infer": "vllm", "reference": "megatron_infer"}
# Row of the table -> its stages; the remaining time is the row "own".
ROWS = {
    "generation": ("generate",),
    "rewards": ("score",),
    "reference log-probs": ("reference_log_probs",),
    "old log-probs": ("old_log_probs",),
    "update": ("update",),
    "weight sync": ("sync_weights",),
}
Seconds = dict[str, float]


class Round(NamedTuple):
    """(wall, CPU) seconds by row for one step of each kind."""

    ours: tuple[Seconds, Seconds]
    bare: tuple[Seconds, Seconds]


class TwoClocks(StageTimer):
    """A `StageTimer` that measures wall time and CPU time."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu = StageTimer(time.process_time)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self.cpu.stage(name), super().stage(name):
            yield

    def laps(self) -> tuple[Seconds, Seconds]:
        """Return wall and CPU seconds by row since the last call."""
        return _by_row(self.lap()), _by_row(self.cpu.lap())


def _by_row(lap: Seconds) -> Seconds:
    rows = {row: sum(lap.get(f"time/{stage}", 0.0) for stage in stages) for row, stages in ROWS.items()}
    return {**rows, "own": lap["time/step"] - sum(rows.values()), "step": lap["time/step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config-name", default="example_gspo")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = _compose(options.config_name, [*options.overrides, "exp_name=step_breakdown"])
    set_environment(config.system_envs)
    _print_table(config, _measure(config, options.rounds))


def _compose(name: str, overrides: list[str]) -> ExperimentConfig:
    Plugins.instance().register(ShippedConfigs)
    with initialize(config_path=None, version_base="1.3"):
        arguments = hydra_arguments(overrides, scratch="unused")
        composed = compose(config_name=name, overrides=arguments, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        config = load_composed(composed).config
    for role, engine in ENGINES.items():
        if config.model_dump()[role]["strategy_args"]["strategy_name"] != engine:
            raise SystemExit(
                f"step_breakdown: {role} is not {engine}, the only engine with a bare step; set strategy=megatron"
            )
    if len(config.rewards) != 1 or not config.needs_reference:
        raise SystemExit(
            "step_breakdown: the bare step needs one reward block and a reference; choose another configuration"
        )
    return config


def _measure(config: ExperimentConfig, rounds: int) -> list[Round]:
    from bare_step import BareStep

    from roll_gspo.pipelines.plan import make_plan
    from roll_gspo.pipelines.rlvr.build import build_components
    from roll_gspo.pipelines.rlvr.steps import RlvrSteps
    from roll_gspo.pipelines.run_folder import open_run_folder
    from roll_gspo.tracking.console import Console

    folder = open_run_folder(config, make_plan(config).text())
    with Console(config.exp_name, rounds, folder.path, stream=io.StringIO()) as console:
        timer = console.timer = TwoClocks()
        components = build_components(config, folder, console)
        try:
            bare = BareStep(config, components, console)
            steps = RlvrSteps(config, components, console)
            measured = [_round(steps, bare, components, timer, step) for step in range(1, rounds + 2)]
        finally:
            components.executor.close()
    return measured[1:]


def _round(steps: RlvrSteps, bare: BareStep, components: RlvrComponents, timer: TwoClocks, step: int) -> Round:
    """Run one step of each kind from the same state."""
    place = components.state.sampler.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        components.actor_train.save(Path(folder))
        bare.load(Path(folder))

    def timed(weights: WeightSource, run: Callable[[int], None]) -> tuple[Seconds, Seconds]:
        components.state.sampler.load_state_dict(place)
        components.actor_infer.update_weights(weights, step - 1)
        timer.laps()
        run(step)
        return timer.laps()

    def ours(step: int) -> None:
        components.output.log(step, steps.train_step(step))

    if step % 2:
        theirs = timed(bare.weights(), bare.step)
        return Round(timed(components.actor_train.weights(), ours), theirs)
    return Round(timed(components.actor_train.weights(), ours), timed(bare.weights(), bare.step))


def _print_table(config: ExperimentConfig, rounds: list[Round]) -> None:
    samples = config.rollout_batch_size * config.num_return_sequences_in_group
    print(f"{samples} samples per step, {len(rounds)} rounds; median seconds, median ratio ours / bare")
    print(f"{'':<20} {'wall: ours':>11} {'bare':>7} {'ratio':>6}   {'CPU: ours':>11} {'bare':>7} {'ratio':>6}")
    for row in [*ROWS, "own", "step"]:
        cells = []
        for clock in (0, 1):
            ours, bare = ([lap[clock][row] for lap in side] for side in zip(*rounds, strict=True))
            ratio = statistics.median(a / b if b else float("nan") for a, b in zip(ours, bare, strict=True))
            cells.append(f"{statistics.median(ours):>11.3f} {statistics.median(bare):>7.3f} {ratio:>6.2f}")
        print(f"{row:<20} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
