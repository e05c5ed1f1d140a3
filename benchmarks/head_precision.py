"""Log-probs in bfloat16 with logits in float32 (`fp32_lm_head`) and in bfloat16, against a float32 model.

    python benchmarks/head_precision.py [--spread 4] [--layers 4] [--hidden 256] [--vocab 32000] [--vllm]

A Qwen3 model with random weights, rounded to bfloat16, samples responses in float32 (`hf_infer`). `hf_infer` then
scores them in float32, in bfloat16, and in bfloat16 with `fp32_lm_head: false`. With `--vllm`, vLLM samples in
bfloat16, with both values of the key, and its log-probs are compared with those of `hf_infer` in bfloat16.

`--spread` is the standard deviation of the logits. Columns: mean, root mean square and maximum of the difference per
token, and the root mean square of its mean over a response, which is the noise of GSPO's log-ratio. "head alone" keeps
the hidden states of the bfloat16 model and computes the head in float64, so that only the head differs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.batch import Completion, Sequences
from roll_gspo.strategies.base import ModelSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import HfWeights, load_model
from roll_gspo.strategies.log_probs import place, token_log_probs
from roll_gspo.strategies.transformers_model import predicting_rows

BF16 = torch.bfloat16


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a random model whose logits have the wanted spread."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 128),
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.5 * arguments.hidden**-0.5,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=arguments.spread * arguments.hidden**-0.5)
    model.to(BF16).save_pretrained(folder)


def setup(folder: Path, dtype: torch.dtype) -> ModelSetup:
    """Return the setup of every engine."""
    return ModelSetup(folder, dtype, micro_batch_size=8, temperature=1.0, seed=0)


def collate(prompts: list[list[int]], completions: list[list[Completion]]) -> Sequences:
    """Return the samples as input of a scorer."""
    return Sequences.collate(prompts, [list(of_prompt[0].token_ids) for of_prompt in completions], pad=0)


@torch.no_grad()
def exact_head(folder: Path, sequences: Sequences) -> Tensor:
    """Return [B, T] log-probs of a float64 head on the hidden states of the bfloat16 model."""
    model = load_model(folder, BF16, "sdpa")
    hidden = torch.cat([model.model(part).last_hidden_state for part in sequences.input_ids.split(8)])
    tokens, rows = sequences.response_ids[sequences.response_mask], hidden[predicting_rows(sequences)]
    weight = model.lm_head.weight.double()
    parts = [
        token_log_probs((part.double() @ weight.t()).float(), ids, 1.0, entropy=False)[0]
        for part, ids in zip(rows.split(256), tokens.split(256), strict=True)
    ]
    return place(torch.cat(parts), sequences.response_mask)


def row(name: str, difference: Tensor, mask: Tensor) -> str:
    """Return a line of the table."""
    tokens, means = difference[mask], (difference * mask).sum(-1) / mask.sum(-1)
    numbers = (tokens.abs().mean(), tokens.square().mean().sqrt(), tokens.abs().max(), means.square().mean().sqrt())
    return f"| {name} | " + " | ".join(f"{float(number):.1e}" for number in numbers) + " |"


def compare_with_vllm(folder: Path, prompts: list[list[int]], sampling: Sampling) -> None:
    """Print the difference between vLLM's log-probs and those of `hf_infer`, in bfloat16."""
    from roll_gspo.strategies.vllm.config import VllmConfig
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    for key in (True, False):
        config = VllmConfig(fp32_lm_head=key, kv_cache_memory_mb=256, max_num_seqs=16)
        engine = VllmGenerate(setup(folder, BF16), config, 512)
        engine.update_weights(HfWeights(load_model(folder, BF16, "sdpa")), 1)
        completions = engine.generate(prompts, sampling, list(range(len(prompts))))
        engine.shutdown()
        sequences = collate(prompts, completions)
        found = HfInfer(setup(folder, BF16), HfConfig(fp32_lm_head=key)).score(sequences).log_probs
        sampled = torch.zeros_like(found)
        for number, (completion,) in enumerate(completions):
            sampled[number, : len(completion.token_ids)] = torch.tensor(completion.log_probs)
        print(row(f"vllm − hf_infer, bf16, fp32_lm_head {str(key).lower()}", found - sampled, sequences.response_mask))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spread", type=float, default=4.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vllm", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(arguments.vocab, (arguments.samples, 8), generator=generator).tolist()
    sampling = Sampling(num_samples=1, max_new_tokens=arguments.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments)
        exact = HfInfer(setup(folder, torch.float32), HfConfig())
        sequences = collate(prompts, exact.generate(prompts, sampling, list(range(len(prompts)))))
        reference, mask = exact.score(sequences).log_probs, sequences.response_mask
        print(
            f"{arguments.layers} layers, hidden size {arguments.hidden}, vocabulary {arguments.vocab:,}, logits of "
            f"standard deviation {arguments.spread:g}, {arguments.samples} responses of {arguments.tokens} tokens\n\n"
            "| difference of log-probs | mean | rms | max | rms of the mean over a response |\n|---|---|---|---|---|"
        )
        head = exact_head(folder, sequences)
        for key in (True, False):
            found = HfInfer(setup(folder, BF16), HfConfig(fp32_lm_head=key)).score(sequences).log_probs
            name = f"fp32_lm_head {str(key).lower()}"
            print(row(f"head alone, {name}", found - head, mask))
            print(row(f"model in bf16 − float32, {name}", found - reference, mask), flush=True)
        if arguments.vllm:
            compare_with_vllm(folder, prompts, sampling)


if __name__ == "__main__":
    main()
