"""Test claims of the GSPO paper (arXiv 2507.18071) on the embedded task: run the studies, print the tables.

    python examples/reproduce_gspo/reproduce.py                   # every study, one to two hours on two cores
    python examples/reproduce_gspo/reproduce.py stability         # one of them
    python examples/reproduce_gspo/reproduce.py staleness --jobs 16 strategy=hf     # with further keys, on 16 cores
    python examples/reproduce_gspo/reproduce.py noise --seeds 2 --jobs 1            # fewer seeds, one run at a time
    python examples/reproduce_gspo/reproduce.py --tables          # print the tables of earlier runs

Complete runs are not repeated. `docs/reproducing-gspo.md` holds the tables and their interpretation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from roll_gspo.tracking.jsonl import read_metrics

# Only the ratio differs: group-normalised advantages, mean over tokens then sequences, no KL (GSPO, 5.1).
# With importance_sampling=token this is GRPO. Each level sets the clip range of the paper.
COMMON = (
    *("--config-name", "example_gspo_paper", "algorithm=gspo_paper", "tracker=none"),
    "actor_train.training_args.save_hf_model=false",
)
SEEDS = (0, 1, 2)
LEVELS = {"GSPO": "importance_sampling=seq", "GRPO": "importance_sampling=token"}
RATE = "actor_train.training_args.learning_rate"
CONSTANT = "actor_train.training_args.lr_scheduler_type=constant"
MOE = ("model=tiny_qwen3_moe",)
SIXTEEN = (
    "actor_train.training_args.per_device_train_batch_size=16",
    "actor_train.training_args.gradient_accumulation_steps=1",
)
# 128 samples and 4 mini-batches per step
SMALL = (
    *("rollout_batch_size=16", "validation.data_args.num_rows=128"),
    "actor_train.training_args.per_device_train_batch_size=16",
)
GEOMETRIC_MASK = ("train_infer_correction=geometric_mask",)
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One row of a table: a folder of runs that differ only in their seed.

    Attributes:
        name: first cell of the row.
        overrides: configuration overrides of the runs.
        steps: rollouts per run.
    """

    name: str
    overrides: tuple[str, ...]
    steps: int

    @property
    def folder(self) -> str:
        """Return the `exp_name` of the runs."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


def best(values: Sequence[float], window: int = 5) -> float:
    """Return the highest mean of `window` consecutive values."""
    return max(_window_means(values, window))


def worst_after_best(values: Sequence[float], window: int = 5) -> float:
    """Return the lowest mean of `window` consecutive values, from the highest such mean on."""
    means = _window_means(values, window)
    return min(means[means.index(max(means)) :])


def _window_means(values: Sequence[float], window: int) -> list[float]:
    return [mean(values[i : i + window]) for i in range(max(1, len(values) - window + 1))]


@dataclass(frozen=True)
class Column:
    """One column of a table: a metric over some of the logged steps of a run.

    Attributes:
        title: head of the column.
        metric: name of the metric.
        steps: the steps.
        digits: format of the number.
        reduce: gives the number of a run.
    """

    title: str
    metric: str
    steps: slice
    digits: str = ".3f"
    reduce: Callable[[Sequence[float]], float] = mean

    def value(self, rows: Sequence[Row]) -> float | None:
        """Return the number of a run, or None if the metric was never logged."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        return self.reduce(values[self.steps]) if values else None


ALL, LAST, END = slice(None), slice(-5, None), slice(-1, None)
STABILITY = (
    Column("reward, best 5", "rollout/score_mean", ALL, reduce=best),
    Column("reward, last 5", "rollout/score_mean", LAST),
    Column("held out", "validation/score_mean", END),
    Column("groups without spread, last 5", "reward/groups_without_spread", LAST),
    Column("clipped tokens", "actor/clip_fraction", ALL, ".4f"),
    Column("abs(ratio - 1)", "actor/ratio_deviation", ALL, ".5f"),
)
ROUTING = (
    Column("reward, last 5", "rollout/score_mean", LAST),
    Column("held out", "validation/score_mean", END),
    Column("experts: rollout against trainer", "routing/rollout_mismatch", ALL, ".4f"),
    Column("experts: after the updates", "routing/update_shift", ALL, ".4f"),
    Column("mean abs(delta log-prob), engine against trainer", "mismatch/log_prob_diff_mean", ALL, ".6f"),
    Column("clipped tokens", "actor/clip_fraction", ALL, ".4f"),
)

STALENESS = (
    Column("reward, last 5", "rollout/score_mean", LAST),
    Column("held out", "validation/score_mean", END),
    Column("clipped tokens", "actor/clip_fraction", ALL, ".4f"),
    Column("abs(ratio - 1)", "actor/ratio_deviation", ALL, ".5f"),
    Column("gradient norm, last 5", "actor/grad_norm", LAST),
)
LAGS = (0, 1, 2, 4, 8)
ALGORITHMS = {
    "GSPO": ("algorithm=gspo_paper",),
    "GSPO, geometric mask": ("algorithm=gspo_paper", *GEOMETRIC_MASK),
    "GRPO": ("algorithm=gspo_paper", LEVELS["GRPO"]),
    "CISPO": ("algorithm=cispo",),
    "SAPO": ("algorithm=sapo",),
}

NOISE = (
    Column("reward, last 5", "rollout/score_mean", LAST),
    Column("held out", "validation/score_mean", END),
    Column("clipped tokens", "actor/clip_fraction", ALL, ".4f"),
    Column("abs(ratio - 1)", "actor/ratio_deviation", ALL, ".5f"),
    Column("noise, two passes", "actor/ratio_noise", ALL, ".1e"),
    Column("noise, engine", "mismatch/ratio_rms", ALL, ".1e"),
)
BF16 = ("actor_train.model_args.dtype=bf16",)  # the engine stays in float32, so that only the trainer rounds
WIDE = ("pg_clip_low=3e-3", "pg_clip_high=4e-3")
ROUNDED_HEAD = ("actor_train.strategy_args.strategy_config.fp32_lm_head=false",)
# Scoring and training pass one sample at a time, so that both compute the same batches.
SINGLE = (
    "actor_train.infer_batch_size=1",
    "actor_train.training_args.per_device_train_batch_size=1",
    "actor_train.training_args.gradient_accumulation_steps=32",
)

AGENTS = (
    Column("success, best 5", "rollout/score_mean", ALL, reduce=best),
    Column("success, worst 5 after the best", "rollout/score_mean", ALL, reduce=worst_after_best),
    Column("success, last 5", "rollout/score_mean", LAST),
    Column("held out", "validation/score_mean", END),
    Column("entropy, last 5", "actor/entropy", LAST),
    Column("turns that the machine cannot read, last 5", "episode/invalid_turns", LAST),
    Column("clipped tokens", "actor/clip_fraction", ALL, ".4f"),
    Column("abs(ratio - 1)", "actor/ratio_deviation", ALL, ".5f"),
)
ADDING_MACHINE = ("data=adding_machine", "response_length=64", "strategy=hf", *SMALL)
LAG_4 = "async_generation_ratio=4"
EPISODES = {
    "GSPO": ADDING_MACHINE,
    "segment": (*ADDING_MACHINE, "importance_sampling=segment"),
    "GRPO": (*ADDING_MACHINE, LEVELS["GRPO"]),
    "CISPO": (*ADDING_MACHINE, "algorithm=cispo"),
    "SAPO": (*ADDING_MACHINE, "algorithm=sapo"),
}

STUDIES: dict[str, tuple[tuple[Setting, ...], tuple[Column, ...]]] = {
    "stability": (
        tuple(
            Setting(f"{name}, {what}", (level, *overrides), 50)
            for what, overrides in (
                ("4 mini-batches, lr 2e-4", (f"{RATE}=2e-4",)),
                ("4 mini-batches, lr 4e-4", (f"{RATE}=4e-4",)),
                ("4 mini-batches, lr 8e-4", (f"{RATE}=8e-4",)),
                ("16 mini-batches, lr 2e-4", (f"{RATE}=2e-4", *SIXTEEN)),
                ("16 mini-batches, lr 2e-4, constant", (f"{RATE}=2e-4", CONSTANT, *SIXTEEN)),
                ("16 mini-batches, lr 4e-4", (f"{RATE}=4e-4", *SIXTEEN)),
            )
            for name, level in LEVELS.items()
        ),
        STABILITY,
    ),
    "routing": (
        tuple(
            Setting(
                f"MoE {name}", (*MOE, level, f"router_replay={replay}", "actor_train.router_replay.record=true"), 50
            )
            for name, level, replay in (
                ("GSPO", LEVELS["GSPO"], "record"),
                ("GRPO", LEVELS["GRPO"], "record"),
                ("GRPO + replay R2", LEVELS["GRPO"], "R2"),
                ("GRPO + replay R3", LEVELS["GRPO"], "R3"),
            )
        ),
        ROUTING,
    ),
    "staleness": (
        tuple(
            Setting(f"{name}, staleness {lag}", (*overrides, f"async_generation_ratio={lag}", *SMALL), 40)
            for name, overrides in ALGORITHMS.items()
            for lag in LAGS
        ),
        STALENESS,
    ),
    "noise": (
        tuple(
            Setting(name, ("strategy=hf", LEVELS["GSPO"], *SMALL, *overrides), 20)
            for name, overrides in (
                ("fp32", ()),
                ("bf16", BF16),
                ("bf16, rounded logits", (*BF16, *ROUNDED_HEAD)),
                ("bf16, one sample per pass", (*BF16, *SINGLE)),
                ("bf16, old log-probs of the engine", (*BF16, "old_log_probs=rollout")),
                ("fp32, clip 3e-3 and 4e-3", WIDE),
                ("bf16, clip 3e-3 and 4e-3", (*BF16, *WIDE)),
                ("fp32, lr 2e-6", (f"{RATE}=2e-6", CONSTANT)),
                ("bf16, lr 2e-6", (*BF16, f"{RATE}=2e-6", CONSTANT)),
            )
        ),
        NOISE,
    ),
    "agents": (tuple(Setting(f"{name}, episodes", keys, 60) for name, keys in EPISODES.items()), AGENTS),
    "agents_stale": (
        tuple(Setting(f"{name}, episodes, staleness 4", (*keys, LAG_4), 60) for name, keys in EPISODES.items()),
        AGENTS,
    ),
}


def run_all(
    settings: Iterable[Setting], output: Path, jobs: int, overrides: Sequence[str] = (), num_seeds: int = len(SEEDS)
) -> None:
    """Run `num_seeds` of every setting that are not complete, `jobs` at a time; interrupted runs resume."""
    seeds = SEEDS[:num_seeds]
    missing = [(s, seed) for seed in seeds for s in settings if last_step(run_folder(s, output, seed)) < s.steps]
    print(f"{len(missing)} runs", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(run, *each, output, jobs, overrides) for each in missing]):
            done.result()


def run(setting: Setting, seed: int, output: Path, jobs: int, overrides: Sequence[str]) -> None:
    """Run one seed of a setting."""
    # The seed is the name of a run, so that an interrupted study finds the missing ones.
    folder = run_folder(setting, output, seed)
    command = [sys.executable, "-m", "roll_gspo.run", *COMMON, *setting.overrides, *overrides]
    command += [f"max_steps={setting.steps}", f"save_steps={setting.steps}", "eval_steps=25", f"seed={seed}"]
    command += [f"exp_name={setting.folder}", f"output_dir={output}", f"run_name={folder.name}"]
    command += ["resume_from_checkpoint=true"]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    print(f"{setting.name}, seed {seed}: {'done' if not result.returncode else f'failed, see {log}'}", flush=True)


def run_folder(setting: Setting, output: Path, seed: int) -> Path:
    """Return the folder of a seed's run."""
    return output / setting.folder / f"seed_{seed}"


def last_step(folder: Path) -> int:
    """Return the last step that a run logged, 0 if there is none."""
    return max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)


def table(settings: Iterable[Setting], columns: Sequence[Column], output: Path) -> str:
    """Return a Markdown table with the mean over the seeds, and each seed in brackets."""
    lines = [
        "| " + " | ".join(["", *(column.title for column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for setting in settings:
        runs = [read_metrics(run_folder(setting, output, seed) / "metrics.jsonl") for seed in SEEDS]
        cells = [_cell(column, [rows for rows in runs if rows]) for column in columns]
        lines.append("| " + " | ".join([setting.name, *cells]) + " |")
    return "\n".join(lines)


def _cell(column: Column, runs: Sequence[Sequence[Row]]) -> str:
    known = [value for rows in runs if (value := column.value(rows)) is not None]
    if not known:
        return "–"
    each = " ".join(f"{value:{column.digits}}" for value in known)
    return f"**{mean(known):{column.digits}}** ({each})"


def main() -> None:
    """Run the selected studies and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY|key=value", help=f"{', '.join(STUDIES)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce_gspo"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of runs per setting")
    parser.add_argument("--tables", action="store_true", help="only print the tables of earlier runs")
    options = parser.parse_args()
    overrides = [text for text in options.studies if "=" in text]
    studies = [text for text in options.studies if "=" not in text]
    if unknown := set(studies) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    for name in studies or STUDIES:
        settings, columns = STUDIES[name]
        if not options.tables:
            run_all(settings, options.output, options.jobs, overrides, options.seeds)
        print(f"\n### {name}\n\n{table(settings, columns, options.output)}", flush=True)


if __name__ == "__main__":
    main()
