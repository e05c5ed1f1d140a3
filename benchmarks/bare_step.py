"""One training step without this framework: vLLM, megatron-core and torch called directly.

Shapes: B samples, S positions, T response positions. `step_breakdown.py` runs this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from roll_gspo.batch import Prompt
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.pipelines.components import load_tokenizer
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.rlvr.build import RlvrComponents
from roll_gspo.pipelines.settings import DTYPES
from roll_gspo.rewards.base import RewardRequest
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.spec import build_reward
from roll_gspo.roles.generator import sample_seeds
from roll_gspo.strategies.megatron.args import MegatronTrainArgs
from roll_gspo.strategies.megatron.engine.attention import decoder_spec
from roll_gspo.strategies.megatron.engine.model import transformer_config
from roll_gspo.strategies.megatron.engine.state import load_state
from roll_gspo.strategies.megatron.engine.weights import MegatronWeights, load_weights
from roll_gspo.strategies.vllm.engine.generate import VllmGenerate
from roll_gspo.tracking.console import Console

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from vllm import LLM, SamplingParams  # isort: skip


class BareStep:
    """A step with separate Megatron models and the vLLM engine, prompts and sampling of `components`.

    A run has one engine per process. The engine is therefore shared and gets the weights of the next kind before each
    step.
    """

    def __init__(self, config: ExperimentConfig, components: RlvrComponents, console: Console) -> None:
        self._config = config
        self._components = components
        self._stage = console.stage
        self._checkpoint = prepare_checkpoint(config, config.pretrain, console)
        self._architecture = Architecture.from_checkpoint(self._checkpoint)
        self._tokenizer = load_tokenizer(self._checkpoint)
        self._reference = self._model()
        self._gpt = self._model()
        self._ddp = DistributedDataParallel(
            self._gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), self._gpt
        )
        training = config.actor_train.training_args
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=training.learning_rate,
                weight_decay=training.weight_decay,
                adam_beta1=training.adam_beta1,
                adam_beta2=training.adam_beta2,
                adam_eps=training.adam_epsilon,
                clip_grad=config.max_grad_norm,
                bf16=self._dtype == torch.bfloat16,
                params_dtype=self._dtype,
            ),
            [self._ddp],
        )
        self._rewards = {
            domain: build_reward(spec_from_config(block, f"rewards.{domain}"))
            for domain, block in config.rewards.items()
        }

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self._config.actor_train.model_args.dtype]

    def _model(self) -> GPTModel:
        args = self._config.actor_train.strategy_args
        assert isinstance(args, MegatronTrainArgs)
        megatron_config = transformer_config(self._architecture, self._dtype, args.strategy_config)
        gpt = GPTModel(
            megatron_config,
            decoder_spec(self._architecture, megatron_config),
            vocab_size=self._architecture.vocab_size,
            max_sequence_length=self._architecture.max_position_embeddings,
            share_embeddings_and_output_weights=self._architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=self._architecture.rope_theta,  # type: ignore[arg-type]
        )
        load_weights([gpt], CheckpointReader(self._checkpoint), self._architecture)
        return gpt

    def load(self, folder: Path) -> None:
        """Load weights and optimizer state that the framework's trainer saved."""
        load_state(folder, [self._gpt], self._optimizer)

    def weights(self) -> MegatronWeights:
        """Return the weights under their Hugging Face names."""
        return MegatronWeights([self._gpt], self._architecture)

    def step(self, step: int) -> None:
        """Generate, compute rewards and two sets of log-probs, train, and transfer the weights."""
        prompts = self._components.state.sampler.next_batch(self._config.rollout_batch_size)
        with self._stage("generate"):
            responses = self._generate(prompts, step)
        owners = [prompt for prompt in prompts for _ in range(len(responses) // len(prompts))]
        with self._stage("score"):
            rewards = torch.tensor(self._score(owners, responses))
        samples = [[*prompt.token_ids, *response] for prompt, response in zip(owners, responses, strict=True)]
        input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in samples], batch_first=True)
        lengths = torch.tensor([len(s) for s in samples])
        positions = torch.arange(input_ids.shape[1] - 1)  # position s predicts token s + 1
        starts = torch.tensor([len(prompt.token_ids) - 1 for prompt in owners])[:, None]
        mask = (positions >= starts) & (positions < lengths[:, None] - 1)
        with self._stage("reference_log_probs"):
            reference = self._log_probs(self._reference, input_ids, lengths)
        with self._stage("old_log_probs"):
            old = self._log_probs(self._gpt, input_ids, lengths)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        with self._stage("update"):
            self._update(input_ids, lengths, mask, advantages, old, reference)
        with self._stage("sync_weights"):
            self._sync()

    def _engine(self) -> LLM:
        strategy = self._components.actor_infer._strategy
        assert isinstance(strategy, VllmGenerate) and strategy._engine is not None
        return strategy._engine[0]

    def _generate(self, prompts: Sequence[Prompt], step: int) -> list[Sequence[int]]:
        sampling = self._components.sampling
        seeds = sample_seeds(self._config.seed, f"step {step}", len(prompts), sampling.num_samples)
        params = [
            SamplingParams(
                n=sampling.num_samples,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        outputs = self._engine().generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]
        return [completion.token_ids for output in outputs for completion in output.outputs]

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[float]:
        texts = self._tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)
        (reward,) = self._rewards.values()
        return [
            reward(RewardRequest(prompt.text, text, prompt.row["ground_truth"]))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _micro_batches(self, index: Tensor, size: int, lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield (sample indices, width of the longest)."""
        for part in index.split(size):
            yield part, int(lengths[part].max())

    @torch.no_grad()
    def _log_probs(self, gpt: GPTModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return [B, S - 1] log-probs of every token given its predecessors."""
        gpt.eval()
        result = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1)
        size = self._config.actor_train.infer_batch_size
        for part, width in self._micro_batches(torch.arange(len(input_ids)), size, lengths):
            ids = input_ids[part, :width]
            result[part, : width - 1] = -gpt(ids[:, :-1], None, None, labels=ids[:, 1:])
        return result

    def _update(
        self, input_ids: Tensor, lengths: Tensor, mask: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
    ) -> None:
        low, high = self._config.clip_range
        self._ddp.train()
        for mini_batch in torch.randperm(len(input_ids)).split(self._config.mini_batch_size):
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            size = self._config.actor_train.training_args.per_device_train_batch_size
            for part, width in self._micro_batches(mini_batch, size, lengths):
                ids, valid = input_ids[part, :width], mask[part, : width - 1]
                log_probs = -self._ddp(ids[:, :-1], None, None, labels=ids[:, 1:])
                change = (log_probs - old[part, : width - 1]) * valid
                ratio = (change.sum(-1) / valid.sum(-1)).exp()
                gain = torch.minimum(ratio * advantages[part], ratio.clamp(1 - low, 1 + high) * advantages[part])
                gap = (reference[part, : width - 1] - log_probs) * valid
                kl = (gap.exp() - gap - 1).sum(-1)
                loss = (self._config.kl_loss_coef * kl - gain * valid.sum(-1)).sum() / len(mini_batch)
                loss.backward()
            self._ddp.finish_grad_sync()
            self._optimizer.step()

    def _sync(self) -> None:
        llm = self._engine()
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self.weights())})
        llm.reset_prefix_cache()
