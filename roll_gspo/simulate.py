"""Simulate step time, idle shares and staleness of a cluster, before renting it.

    python -m roll_gspo.simulate [options] [--config-name NAME [key=value ...]]

Response lengths are those of a run (--run) or log-normal. The clock is virtual; the scheduler is that of real runs.
No torch is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow as pa
from omegaconf import DictConfig

from roll_gspo.command_line import check_arguments
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import ConfigError, DataError
from roll_gspo.printable import printable
from roll_gspo.registry import did_you_mean
from roll_gspo.rollout_files import read_columns, rollout_files
from roll_gspo.run import exit_status, load_composed, report_problems, with_composed
from roll_gspo.scheduling.lengths import Lengths, LogNormalLengths, RecordedLengths
from roll_gspo.scheduling.simulation import Cluster, Schedule, Simulated, simulate
from roll_gspo.tracking.jsonl import read_metrics

OF_LENGTHS = ("median", "sigma", "max_tokens", "samples", "seed")
OF_HYDRA = ("--config-name", "--config-dir", "--config-path", "--cfg", "--package", "--info", "--resolve")
PROMPTS = "rollout/prompt_length_mean"
TAIL = 20  # longest response in medians, if no median is given


@dataclass(frozen=True)
class Settings:
    """All options. Speeds are those of one GPU or one engine.

    Attributes:
        gpus: GPU counts.
        split: shares of the GPUs for engines.
        engine_gpus: GPUs per engine.
        capacity: requests that an engine decodes at the same time.
        step_ms, request_ms: a decode step with r requests takes `step_ms + r * request_ms`.
        train_tokens_per_s: tokens per second of one GPU of the trainer.
        sync_s: seconds of a weight transfer.
        steps: measured steps.
        json: print JSON.
        groups: prompts per step.
        samples: responses per prompt; those of the run if lengths are recorded.
        staleness: values of `async_generation_ratio`.
        mode: `async_mode`.
        partial: `partial_rollouts`.
        run: run whose lengths are replayed.
        recorded: lengths of its groups.
        median, sigma, max_tokens, seed: log-normal lengths without a run.
        prompt_tokens: mean length of a prompt.
    """

    gpus: tuple[int, ...]
    split: tuple[float, ...]
    capacity: int
    step_ms: float
    request_ms: float
    train_tokens_per_s: float
    sync_s: float
    steps: int
    json: bool
    engine_gpus: int = 1
    groups: int = 128
    samples: int = 8
    staleness: tuple[int, ...] = (0, 1)
    mode: Literal["one_step_off", "in_flight"] = "one_step_off"
    partial: Literal["continue", "restart", "drop"] = "continue"
    run: Path | None = None
    recorded: tuple[tuple[int, ...], ...] = ()
    max_tokens: int = 8192
    median: float = 0.0
    sigma: float = 1.0
    seed: int = 0
    prompt_tokens: float = 0.0

    def lengths(self) -> Lengths:
        """Return the response lengths."""
        if self.recorded:
            return RecordedLengths(self.recorded)
        return LogNormalLengths(self.median, self.sigma, self.max_tokens, self.samples, self.seed)

    def lengths_text(self) -> str:
        """Describe the response lengths."""
        if not self.recorded:
            return f"log-normal: median {self.median:g}, sigma {self.sigma:g}, at most {self.max_tokens} tokens"
        every = sorted(length for group in self.recorded for length in group)
        return f"{len(every)} responses of {self.run}: median {every[len(every) // 2]}, longest {every[-1]} tokens"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        gpus: GPUs of the cluster.
        train_gpus: GPUs of the trainer; the engines have the others.
        engines: number of engines.
        staleness: maximum staleness.
        result: the simulation.
    """

    gpus: int
    train_gpus: int
    engines: int
    staleness: int
    result: Simulated


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _number(kind: Callable[[str], float], lowest: float, is_excluded: bool = False) -> Callable[[str], Any]:
    """Return a parser of numbers from `lowest` on."""

    def parse(text: str) -> float:
        what = "a whole number" if kind is int else "a number"
        limit = f"above {lowest:g}" if is_excluded else f"of at least {lowest:g}"
        try:
            value = kind(text)
            valid = lowest < value < float("inf") if is_excluded else lowest <= value < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} {limit}; give one")
        return value

    return parse


def _several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(dict.fromkeys(parse(part) for part in text.split(",")))


def _share(text: str) -> float:
    value = _number(float, 0, is_excluded=True)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"'{text}' leaves no GPU to the trainer; give a share below 1, e.g. 0.5")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options. Options that a configuration or a run can set have no default."""
    parser = _Parser(prog="python -m roll_gspo.simulate", description=__doc__, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    count, positive, seconds = _number(int, 1), _number(float, 0, is_excluded=True), _number(float, 0)
    several, share = _several(count), _several(_share)
    add = parser.add_argument_group("cluster").add_argument
    add("--gpus", type=several, default=tuple(2**i for i in range(3, 11)), help="GPU counts (default 8,16,...,1024)")
    add("--split", type=share, default=(0.25, 0.5, 0.75), help="shares of the GPUs for engines (0.25,0.5,0.75)")
    add("--engine-gpus", type=count, help="GPUs per engine (1)")
    add("--capacity", type=count, default=256, help="requests that an engine decodes at a time (256)")
    add("--step-ms", type=positive, default=10.0, help="decode step of an engine in ms (10)")
    add("--request-ms", type=seconds, default=0.05, help="and per running request (0.05)")
    add("--train-tokens-per-s", type=positive, default=4000.0, help="trained tokens per second and GPU (4000)")
    add("--sync-s", type=seconds, default=2.0, help="seconds of a weight transfer (2)")
    add = parser.add_argument_group("batches; the configuration sets those that you omit").add_argument
    add("--groups", type=count, help="prompts per step (128)")
    add("--samples", type=count, help="responses per prompt (8)")
    add("--staleness", type=_several(_number(int, 0)), help="values of async_generation_ratio (0,1)")
    add("--mode", choices=("one_step_off", "in_flight"), help="async_mode (one_step_off)")
    add("--partial", choices=("continue", "restart", "drop"), help="partial_rollouts (continue)")
    add = parser.add_argument_group("lengths").add_argument
    add("--run", type=Path, metavar="FOLDER", help="replay the response lengths in rollouts/ of a run")
    add("--median", type=positive, help=f"median of log-normal lengths (longest / {TAIL})")
    add("--sigma", type=seconds, help="standard deviation of their logarithm (1)")
    add("--max-tokens", type=count, help="longest response (8192)")
    add("--prompt-tokens", type=seconds, help="mean tokens of a prompt (run, else 0)")
    add = parser.add_argument_group("simulation").add_argument
    add("--steps", type=count, default=10, help="measured steps, after warm-up (10)")
    add("--seed", type=_number(int, 0), help="seed of log-normal lengths (0)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main() -> None:
    """Console entry point. The exit status is the same as in `roll_gspo.run.main`."""
    arguments, parser = sys.argv[1:], make_parser()
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        raise SystemExit(0)
    try:
        options, rest = parser.parse_known_args(arguments)
        _check_rest(rest, parser)
    except ConfigError as error:
        report_problems(str(error).splitlines(), "command line")
        raise SystemExit(2) from None

    def use(composed: DictConfig | None) -> None:
        def command() -> int:
            return run(options, _experiment(composed) if composed is not None else None)

        if code := exit_status(command, "simulate again"):
            raise SystemExit(code)

    with_composed(rest, use) if rest else use(None)


def _check_rest(rest: list[str], parser: argparse.ArgumentParser) -> None:
    """Check the arguments that are no options of this command. They compose a configuration."""
    own = sorted(parser._option_string_actions)
    for argument in rest:
        name = argument.partition("=")[0]
        suggestion = did_you_mean(name, [*own, *OF_HYDRA])
        if name.startswith("--") and name not in OF_HYDRA and any(f"'{option}'" in suggestion for option in own):
            raise ConfigError(f"{name}: unknown option{suggestion} (--help lists all)")
    check_arguments(rest)
    if {"-m", "--multirun", "--dry-run"} & set(rest):
        raise ConfigError("--multirun, --dry-run: are options of a run; remove them")


def _experiment(composed: DictConfig) -> ExperimentConfig:
    config = load_composed(composed).config
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"pipeline: {config.pipeline} generates nothing; name a configuration of pipeline: rlvr")
    return config


def run(options: argparse.Namespace, config: ExperimentConfig | None) -> int:
    """Simulate every combination, print the table or JSON, and return the exit status.

    Raises:
        ConfigError: options exclude each other, or a GPU count is too small.
        DataError: the rollouts of --run cannot be read.
    """
    settings = complete_settings(options, config)
    if not settings.json:
        print(printable(_title(settings)), flush=True)
    rows: list[Row] = []
    for gpus in settings.gpus:
        rows += (of_count := list(simulate_rows(settings, gpus)))
        if not settings.json:
            print("\n".join(_lines(settings, of_count)), flush=True)
    if settings.json:
        chosen = {key: value for key, value in vars(settings).items() if key not in ("json", "recorded")}
        content = {"settings": chosen | {"lengths": settings.lengths_text()}, "rows": [asdict(row) for row in rows]}
        print(json.dumps(content, default=str))
    return 0


def complete_settings(options: argparse.Namespace, config: ExperimentConfig | None) -> Settings:
    """Fill in what the options omit: from the run, the configuration, or defaults, in this order.

    Raises:
        ConfigError: options exclude each other.
        DataError: the rollouts of --run cannot be read.
    """
    given = {key: value for key, value in vars(options).items() if value is not None}
    known: dict[str, Any] = {}
    if config is not None:
        known = {
            "groups": config.rollout_batch_size,
            "samples": config.num_return_sequences_in_group,
            "max_tokens": config.max_response_length,
            "staleness": (config.async_generation_ratio,),
            "mode": config.async_mode,
            "partial": config.partial_rollouts,
            "engine_gpus": config.actor_infer.strategy_args.devices_per_worker,
        }
    if options.run is not None:
        if unused := [f"--{key.replace('_', '-')}" for key in OF_LENGTHS if key in given]:
            raise ConfigError(f"{', '.join(unused)}: no effect with --run, whose lengths are replayed; remove one")
        known |= _of_run(options.run)
    settings = Settings(**{**known, **given})
    if not settings.median:
        settings = replace(settings, median=max(1.0, settings.max_tokens / TAIL))
    if settings.median > settings.max_tokens:
        raise ConfigError(f"--median: {settings.median:g} exceeds the limit of {settings.max_tokens} tokens; lower it")
    if options.partial not in (None, "continue") and settings.mode == "one_step_off":
        raise ConfigError(f"--partial: {settings.partial} needs weights that change in flight; add --mode in_flight")
    for gpus in settings.gpus:
        if gpus <= settings.engine_gpus:
            message = f"--gpus: {gpus} cannot hold an engine of {settings.engine_gpus} and a trainer"
            raise ConfigError(f"{message}; give {settings.engine_gpus + 1} or more, or lower --engine-gpus")
    return settings


def _of_run(folder: Path) -> dict[str, Any]:
    """Return groups per step, recorded lengths and prompt length of a run.

    Raises:
        DataError: it has no rollouts, or they cannot be read.
    """
    groups: list[tuple[int, ...]] = []
    files = rollout_files(folder / "rollouts") or rollout_files(folder)
    for _, path in files:
        try:
            columns = read_columns(path, ["group", "response_length"])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error}); give another --run") from error
        of_step: dict[int, list[int]] = {}
        for group, length in zip(columns["group"], columns["response_length"], strict=True):
            of_step.setdefault(group, []).append(max(1, length))
        groups += map(tuple, of_step.values())
    if not groups:
        raise DataError(f"--run: {folder} has no rollouts/step_*.parquet; give the folder of a run that wrote rollouts")
    found: dict[str, Any] = {"groups": max(1, round(len(groups) / len(files))), "recorded": tuple(groups)}
    prompts = [row[PROMPTS] for row in read_metrics(folder / "metrics.jsonl") if row.get(PROMPTS) is not None]
    if prompts:
        found["prompt_tokens"] = sum(prompts) / len(prompts)
    return found


def simulate_rows(settings: Settings, gpus: int) -> Iterator[Row]:
    """Yield a row per split of the GPUs and staleness."""
    per_engine, warm_up = settings.engine_gpus, max(settings.staleness) + 1
    most = (gpus - 1) // per_engine
    counts = dict.fromkeys(min(most, max(1, round(gpus * share / per_engine))) for share in settings.split)
    for engines in counts:
        train_gpus = gpus - engines * per_engine
        cluster = Cluster(
            engines=engines,
            capacity=settings.capacity,
            step_s=settings.step_ms / 1e3,
            step_s_per_request=settings.request_ms / 1e3,
            trained_tokens_per_s=settings.train_tokens_per_s * train_gpus,
            sync_s=settings.sync_s,
        )
        for staleness in settings.staleness:
            schedule = Schedule(settings.groups, settings.prompt_tokens, staleness, settings.mode, settings.partial)
            result = simulate(cluster, schedule, settings.lengths(), settings.steps, warm_up)
            yield Row(gpus, train_gpus, engines, staleness, result)


def _title(settings: Settings) -> str:
    samples = "" if settings.recorded else f" × {settings.samples} samples"
    partial = f", partial rollouts: {settings.partial}" if settings.mode == "in_flight" else ""
    rows = (
        ("batch", f"{settings.groups} prompts of {settings.prompt_tokens:g} tokens{samples} per step"),
        ("lengths", settings.lengths_text()),
        (
            "engines",
            f"{settings.engine_gpus} GPU(s) each, {settings.capacity} requests at a time, {settings.step_ms:g} ms + "
            f"{settings.request_ms:g} ms per request and decode step",
        ),
        ("trainer", f"{settings.train_tokens_per_s:g} tokens/s per GPU, weight transfer {settings.sync_s:g} s"),
        ("mode", f"{settings.mode}{partial}; {settings.steps} steps"),
    )
    titles = ("GPUs", "train", "engines", "stale ≤", "step s", "trainer", "engines", "running", "tokens/s")
    head = _cells(titles)
    above = f"{'':<{len(_cells(titles[:5]))}}   ---- idle ----"
    return "\n".join([*(f"  {label:<8} {text}" for label, text in rows), "", above, f"{head}  staleness of tokens"])


def _cells(values: Sequence[object]) -> str:
    return "".join(f"{value:>9}" for value in values)


def _lines(settings: Settings, rows: list[Row]) -> list[str]:
    """Return the lines of a GPU count; a star marks the shortest step."""
    best = min(rows, key=lambda row: row.result.step_s)
    lines = []
    for row in rows:
        result = row.result
        shares = ", ".join(f"{staleness}: {share:.0%}" for staleness, share in result.staleness.items())
        values = (row.gpus, row.train_gpus, row.engines * settings.engine_gpus, row.staleness)
        times = (f"{result.step_s:.1f}", f"{result.trainer_idle:.0%}", f"{result.engines_idle:.0%}")
        speed = (f"{result.running:.1f}", f"{result.tokens_per_s:.0f}")
        discarded = f"; discarded {result.discarded:.0%}" if result.discarded else ""
        lines.append(f"{_cells((*values, *times, *speed))}  {shares}{discarded}{' *' if row is best else ''}")
    return lines


if __name__ == "__main__":
    main()
