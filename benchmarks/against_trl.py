"""Compare seconds per step and peak memory with TRL's `GRPOTrainer` on the same model, prompts and batch.

    python -m venv trl-venv && trl-venv/bin/pip install trl==1.16.0
    python benchmarks/against_trl.py --trl-python trl-venv/bin/python [--rounds 3] [--sizes 0.6 5 20]

Both sides run GSPO in float32 with random weights: 32 prompts of 8 responses of at most 48 tokens per step, 4
mini-batches, a KL loss, no validation. Each run is a separate process tree with `--threads` threads; the sides
alternate. The first step of a run is not counted. Memory is the peak of the proportional set sizes (PSS) of all
processes, reward workers included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from roll_gspo.data.column_addition import rows
from roll_gspo.models.tiny import TINY_MODELS, TinyModel, build_model, byte_tokenizer, save

HERE = Path(__file__).parent
# Million parameters -> differences from the builtin model of 0.6 million.
SIZES: dict[str, dict[str, int]] = {
    "0.6": {},
    "5": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8},
    "20": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 16},
}
ENGINES = ("megatron", "hf")
POLL_S = 0.25


@dataclass
class Side:
    """Results of one side: median seconds per step and peak GiB of every run."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trl-python", type=Path, required=True, help="python of an environment with trl")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="options of `strategy`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="counted steps per run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for this project's runs")
    options = parser.parse_args()
    print("| million parameters | | s per step | of TRL | peak GiB | of TRL |\n|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            _print_rows(size, _measured(options, size, Path(folder)))


def _measured(options: argparse.Namespace, size: str, folder: Path) -> dict[str, Side]:
    checkpoint, prompts = folder / "model", folder / "prompts.json"
    model = build_model(TinyModel({**TINY_MODELS["tiny_qwen3"].hf_config, **SIZES[size]}), seed=0)
    save(model, byte_tokenizer(), checkpoint)
    prompts.write_text(json.dumps([row.messages[0]["content"] for row in rows(1024, 0, "train")]))
    sides = {name: Side() for name in ("trl", *options.engines)}
    for number in range(options.rounds):
        for name, side in sides.items():
            out = folder / f"{name}-{number}"
            out.mkdir()
            if name == "trl":
                seconds, memory = _run_trl(options, checkpoint, prompts, out)
            else:
                seconds, memory = _run_own(options, name, checkpoint, out)
            side.seconds.append(statistics.median(seconds[1:]))
            side.memory.append(memory)
    return sides


def _run_trl(options: argparse.Namespace, checkpoint: Path, prompts: Path, out: Path) -> tuple[list[float], float]:
    result = out / "seconds.json"
    arguments = [HERE / "trl_steps.py", checkpoint, prompts, result, "--rollouts", options.steps + 1]
    memory = _run([options.trl_python, *arguments, "--threads", options.threads], out, options.threads)
    return json.loads(result.read_text()), memory


def _run_own(options: argparse.Namespace, engine: str, checkpoint: Path, out: Path) -> tuple[list[float], float]:
    overrides = [
        f"strategy={engine}",
        f"pretrain={checkpoint}",
        "rewards.column_addition.worker_cls=against_trl_reward.reward",
        f"output_dir={out}",
        "exp_name=own",
        "run_name=run",
        f"max_steps={options.steps + 1}",
        "actor_train.training_args.warmup_steps=0",
        "validation=null",
        "tracker=none",
        *options.overrides,
    ]
    command = [sys.executable, "-m", "roll_gspo.run", "--config-name", "example_gspo", *overrides]
    memory = _run(command, out, options.threads)
    lines = (out / "own" / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["time/step"] for line in map(json.loads, lines) if "time/step" in line], memory


def _run(command: Sequence[object], out: Path, threads: int) -> float:
    """Run a command to its end and return the peak memory of its process tree in GiB."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log = out / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
        peak, ended = [0.0], threading.Event()
        watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, ended))
        watcher.start()
        status = process.wait()
        ended.set()
        watcher.join()
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {status}:\n{log.read_text()[-3000:]}")
    return peak[0] / 2**30


def _watch_memory(pid: int, peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(POLL_S):
        total = 0
        try:
            root = psutil.Process(pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak[0] = max(peak[0], float(total))


def _print_rows(size: str, sides: dict[str, Side]) -> None:
    trl = sides["trl"]
    for name, side in sides.items():
        seconds, memory = statistics.median(side.seconds), statistics.median(side.memory)
        pairs = zip(side.seconds, trl.seconds, strict=True)
        ratio = statistics.median(own / other for own, other in pairs)
        title = "TRL" if name == "trl" else f"strategy={name}"
        of_memory = memory / statistics.median(trl.memory)
        print(f"| {size} | {title} | {seconds:.2f} | {ratio:.2f} | {memory:.2f} | {of_memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
