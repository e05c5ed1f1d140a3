"""Check that a refactoring changed no result: record short runs of two checkouts and compare them bit for bit.

    python scripts/compare_trajectories.py record BEFORE.json --checkout path/to/old/checkout
    python scripts/compare_trajectories.py record AFTER.json
    python scripts/compare_trajectories.py compare BEFORE.json AFTER.json

`record` trains three steps of each case below in a temporary folder. It keeps every metric of `metrics.jsonl` except
times and memory, and SHA-256 digests of all prompts, responses, scores and log-probs and of the exported weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("max_steps=3", "save_steps=3", "eval_steps=3")
RL_SIZES = (*SIZES, "warm_start.steps=60", "rollout_batch_size=16", "validation.data_args.num_rows=32")
CASES: dict[str, tuple[str, ...]] = {
    "example_gspo": ("--config-name", "example_gspo", *RL_SIZES),
    "example_grpo": ("--config-name", "example_grpo", *RL_SIZES),
    "ppo": ("--config-name", "example_ppo", *RL_SIZES),
    "sft": ("--config-name", "example_sft", *SIZES),
    "moe_replay": ("--config-name", "example_gspo", *RL_SIZES, "model=tiny_qwen3_moe", "router_replay=R3"),
    "two_ranks": ("--config-name", "example_gspo", *RL_SIZES, "layout=two_ranks"),
}
# Metrics that depend on the machine.
EXCLUDED = ("time/", "memory/", "rollout/tokens_per_s", "sft/tokens_per_s", "reward/hidden_share", "reward/seconds")
SAMPLE_COLUMNS = ("prompt", "response", "score", "rollout_log_probs", "old_log_probs", "advantages")
TIMEOUT_S = 900


def record(checkout: Path, cases: list[str]) -> dict[str, Any]:
    """Run the cases on the code of `checkout` and return their metrics and digests by name."""
    return {name: _record_case(name, checkout) for name in cases}


def _record_case(name: str, checkout: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "roll_gspo.run", *CASES[name], f"output_dir={folder}/output"]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
        (run,) = (path.parent for path in Path(folder).glob("output/*/*/metrics.jsonl"))
        return {"metrics": _metrics(run), "samples": _samples_digest(run), "weights": _weights_digest(run)}


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if _is_compared(key)} for line in lines]


def _is_compared(key: str) -> bool:
    return not key.startswith(EXCLUDED)


def _samples_digest(run: Path) -> str:
    from pyarrow import parquet

    digest = hashlib.sha256()
    for file in sorted(run.glob("rollouts/step_*.parquet")):
        for row in parquet.read_table(file, columns=list(SAMPLE_COLUMNS)).to_pylist():
            digest.update(json.dumps([row.get(column) for column in SAMPLE_COLUMNS]).encode())
    return digest.hexdigest()


def _weights_digest(run: Path) -> str:
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    files = sorted(run.glob("checkpoints/step_*/actor_train_hf/*.safetensors"))
    if not files:
        sys.exit(f"{run}: no exported weights below checkpoints/step_*/actor_train_hf")
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line per difference; empty if every case is equal bit for bit."""
    problems = [f"{name}: recorded on one side only" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        problems += [f"{name}: {part} differ" for part in ("samples", "weights") if old[part] != new[part]]
        if len(old["metrics"]) != len(new["metrics"]):
            problems.append(f"{name}: {len(old['metrics'])} lines of metrics became {len(new['metrics'])}")
        for line, (one, other) in enumerate(zip(old["metrics"], new["metrics"], strict=False), start=1):
            problems += [
                f"{name}: line {line}: {key}: {one.get(key)!r} became {other.get(key)!r}"
                for key in sorted(one.keys() | other.keys())
                if _is_compared(key) and one.get(key) != other.get(key)
            ]
    return problems


def main() -> None:
    """Parse the command line and record or compare; exit status 1 if two recordings differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases and write their results")
    recording.add_argument("file", type=Path)
    recording.add_argument("--checkout", type=Path, default=ROOT, help="folder with the code to run (default: this)")
    recording.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    comparing = commands.add_parser("compare", help="compare two results")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        arguments.file.write_text(json.dumps(record(arguments.checkout.resolve(), arguments.cases), indent=1))
        return
    before, after = (json.loads(file.read_text()) for file in (arguments.before, arguments.after))
    problems = compare(before, after)
    print("\n".join(problems) or f"{len(before)} cases are equal bit for bit: {', '.join(before)}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
