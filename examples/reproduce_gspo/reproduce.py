"""Test claims of the GSPO paper (arXiv 2507.18071) on the embedded task: run the studies, print the tables.

    python examples/reproduce_gspo/reproduce.py                   # every study, about an hour on two cores
    python examples/reproduce_gspo/reproduce.py stability         # one of them
    python examples/reproduce_gspo/reproduce.py --tables          # print the tables of earlier runs

Complete runs are not repeated. `docs/reproducing-gspo.md` holds the tables and their interpretation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Column:
    """One column of a table: the mean of a metric over some of the logged steps of a run."""

    title: str
    metric: str
    steps: slice
    digits: str = ".3f"

    def value(self, rows: Sequence[Row]) -> float | None:
        """Return the mean, or None if the metric was never logged."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        return mean(values[self.steps]) if values else None


ALL, LAST, END = slice(None), slice(-5, None), slice(-1, None)
STABILITY = (
    Column("reward, best 5", "rollout/score_mean", ALL),
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
}


def run(setting: Setting, output: Path, jobs: int) -> None:
    """Run the seeds of a setting that are not complete; interrupted runs resume."""
    missing = [seed for seed in SEEDS if last_step(run_folder(setting, output, seed)) < setting.steps]
    if not missing:
        return
    command = [sys.executable, "-m", "roll_gspo.run", "--multirun", "--jobs", str(jobs), *COMMON, *setting.overrides]
    command += [f"max_steps={setting.steps}", f"save_steps={setting.steps}", "eval_steps=25"]
    command += [f"exp_name={setting.folder}", f"output_dir={output}", "resume_from_checkpoint=true"]
    # The seed is the name of a run, so that an interrupted study finds the missing ones.
    command += [f"seed={','.join(map(str, missing))}", "run_name='seed_${seed}'"]
    print(f"\n{setting.name}: seeds {', '.join(map(str, missing))}", flush=True)
    subprocess.run(command, check=True)


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
    values = [best(rows) if column.title == "reward, best 5" else column.value(rows) for rows in runs]
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    each = " ".join(f"{value:{column.digits}}" for value in known)
    return f"**{mean(known):{column.digits}}** ({each})"


def best(rows: Sequence[Row], window: int = 5) -> float | None:
    """Return the highest mean reward of `window` consecutive steps, None if there are too few."""
    rewards = [row["rollout/score_mean"] for row in rows if "rollout/score_mean" in row]
    return max((mean(rewards[i : i + window]) for i in range(len(rewards) - window + 1)), default=None)


def main() -> None:
    """Run the selected studies and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"one of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce_gspo"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--tables", action="store_true", help="only print the tables of earlier runs")
    options = parser.parse_args()
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    for name in options.studies or STUDIES:
        settings, columns = STUDIES[name]
        if not options.tables:
            for setting in settings:
                run(setting, options.output, options.jobs)
        print(f"\n### {name}\n\n{table(settings, columns, options.output)}", flush=True)


if __name__ == "__main__":
    main()
