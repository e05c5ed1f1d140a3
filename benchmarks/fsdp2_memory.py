"""Memory per rank of the FSDP2 engine for two model sizes and several numbers of ranks (Linux only).

    python benchmarks/fsdp2_memory.py [--sizes 20 300] [--ranks 1 2 4] [--dtype float32] [--tokens 128]

Every case trains a random Qwen3 model for two steps in fresh processes (gloo, one thread each). Per rank are printed:

* state: bytes of parameters, gradients and both moments, counted from the tensors before an optimizer step
* plan: the same by the estimate of the plan, parameters x 16 / ranks
* load, update: largest resident memory while the model is loaded and during the second step, above that of the process
  after a step of a tiny model

The model is read from a memory-mapped file, whose pages count in `load`. Compare ratios within a run: the largest rank
against one rank.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, TokenScores
from roll_gspo.strategies.fsdp2.config import Fsdp2Config

MIB = 2**20
BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments
WARM_UP = 0
# millions of parameters -> shape
SHAPES: dict[int, dict[str, int]] = {
    WARM_UP: {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2},
    20: {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 11},
    300: {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24},
}


class Memory(NamedTuple):
    """Bytes of one rank."""

    parameters: int
    state: int
    load: int
    update: int


def write_model(folder: Path, size: int) -> None:
    """Write a random checkpoint of `size` million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES[size]
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "num_key_value_heads": shape["hidden_size"] // 128}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, head_dim=64, tie_word_embeddings=True)).save_pretrained(folder)


def resident(key: str) -> int:
    """Return a memory size of this process from the kernel, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the kernel count the largest resident memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def rank_of(rank: int, ranks: int, folder: str, dtype: str, tokens: int) -> None:
    """Train two steps on a rank and write what it needed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train

    def built(name: str) -> Fsdp2Train:
        setup = ModelSetup(Path(folder) / name, getattr(torch, dtype), 1, temperature=1.0, seed=0)
        return Fsdp2Train(setup, OptimizerSetup(1e-4, total_steps=2, max_grad_norm=1.0), Fsdp2Config())

    batch, found = _batch(ranks, tokens), list[int]()
    built("tiny").update(batch.split(1), _loss, False)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    engine = built("model")
    load = resident("VmHWM") - before
    engine.update(batch.split(1), _loss, False)

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.append(sum(tensor.numel() * tensor.element_size() for tensor in _state_of(optimizer)))

    engine._trainer._optimizer.register_step_pre_hook(count)
    forget_peak()
    engine.update(batch.split(1), _loss, False)
    parameters = sum(parameter.numel() for parameter in engine._model.module.parameters())
    memory = Memory(parameters, found[0], load, resident("VmHWM") - before)
    torch.save(tuple(memory), f"{folder}/memory_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    moments: list[Any] = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [tensor.to_local() for tensor in (*parameters, *(p.grad for p in parameters), *moments)]


def _batch(samples: int, tokens: int) -> TrainBatch:
    vocabulary = min(shape["vocab_size"] for shape in SHAPES.values())
    ids = torch.randint(vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(0))
    half = tokens // 2
    sequences = Sequences.collate(ids[:, :half].tolist(), ids[:, half:].tolist(), pad=0)
    ones = torch.ones(sequences.response_mask.shape)
    return TrainBatch(sequences, torch.arange(samples), ones, ones, ones)


def _loss(scores: TokenScores, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    return -(scores.log_probs * batch.advantages).sum() / batch.response_mask.sum(), {}


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=[20, 300], default=[20, 300])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    # glibc would keep freed tensors up to 32 MiB as resident memory; the processes of the ranks inherit this
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    print(f"MiB of the largest rank, {arguments.dtype}, {arguments.tokens} tokens per rank; in brackets: of one rank")
    print("| parameters | ranks | state | plan | load | update |\n|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", size)
            write_model(Path(folder) / "tiny", WARM_UP)
            first: Memory | None = None
            for ranks in arguments.ranks:
                (Path(folder) / "store").unlink(missing_ok=True)
                torch.multiprocessing.spawn(rank_of, (ranks, folder, arguments.dtype, arguments.tokens), nprocs=ranks)
                of_ranks = [Memory(*torch.load(f"{folder}/memory_{rank}.pt")) for rank in range(ranks)]
                largest = Memory(*(max(values) for values in zip(*of_ranks, strict=True)))
                first = first or largest
                print(_row(ranks, largest, first), flush=True)


def _row(ranks: int, found: Memory, first: Memory) -> str:
    plan = found.parameters * BYTES_PER_PARAMETER / ranks
    cells = [f"{found.parameters / 1e6:.1f} M", str(ranks)]
    cells += [f"{found.state / MIB:.1f} ({found.state / first.state:.3f})", f"{plan / MIB:.1f}"]
    cells += [f"{found.load / MIB:.0f} ({found.load / first.load:.2f})"]
    cells += [f"{found.update / MIB:.0f} ({found.update / first.update:.2f})"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
