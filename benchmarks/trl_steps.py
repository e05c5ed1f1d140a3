"""GSPO with TRL's `GRPOTrainer`, for `against_trl.py`. Needs the package `trl`, not this project.

    python benchmarks/trl_steps.py CHECKPOINT PROMPTS.json OUT.json --rollouts 6 --threads 2

Batch, lengths, mini-batches, loss and optimizer are those of `example_gspo`. Generation uses transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from against_trl_reward import digit_share
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

MINI_BATCHES = 4


class RolloutClock(TrainerCallback):
    """Seconds between the ends of rollouts, each with its `MINI_BATCHES` optimizer steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the time of a rollout after its last optimizer step."""
        if state.global_step % MINI_BATCHES == 0:
            now = time.perf_counter()
            self.seconds.append(now - self._last)
            self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rollouts", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = RolloutClock()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in json.loads(options.prompts.read_text())]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [digit_share(one[0]["content"]) for one in completions],
        train_dataset=Dataset.from_list(rows),
        args=_arguments(options.out.parent, options.rollouts),
        callbacks=[clock],
    )
    trainer.train()
    options.out.write_text(json.dumps(clock.seconds))


def _arguments(folder: Path, rollouts: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        steps_per_generation=MINI_BATCHES,
        num_generations=8,
        max_completion_length=48,
        max_steps=rollouts * MINI_BATCHES,
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.001,
        temperature=1.0,
        learning_rate=2e-4,
        adam_beta2=0.99,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=MINI_BATCHES,
        report_to=[],
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
