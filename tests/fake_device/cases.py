"""Engines on the fake device against the same engines on the CPU; run in a process that runs nothing else.

Every case returns the traffic of its stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from engine_cases import model_setup, optimizer_setup, sequences, train_batch, value_batch
from fake_device.backend import DeviceTensor, MixedDevices, Traffic, counted
from fake_device.engines import device, install
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.algorithms.staleness import engine_metrics
from roll_gspo.algorithms.value_loss import ValueLossSettings, value_loss
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric, to_floats
from roll_gspo.strategies.base import ModelSetup, Sampling, TokenScores, TrainStrategy, UpdateResult
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.hf.value import HfValue
from roll_gspo.strategies.megatron.config import MegatronConfig

OPTIMIZER = optimizer_setup(learning_rate=1e-3, warmup_steps=0)
LOSS = PolicyLossSettings(
    *("seq", 0.2, 0.2, 3.0, "seq-mean-token-mean", 16),
    kl_loss_coef=0.01,
    entropy_loss_coef=0.01,
    off_policy_mask_threshold=5.0,
    correction=CorrectionSettings("token", "truncate"),
)
Stages = dict[str, Traffic]
Recorded = dict[str, Any]


def batch_of_everything(seed: int = 1) -> TrainBatch:
    """Return a batch with every optional field except the experts; log-probs are below 0 or masked."""
    batch = train_batch(seed)
    mask, below = batch.response_mask, -batch.old_log_probs.abs()
    return replace(
        batch,
        old_log_probs=below,
        rollout_log_probs=below - 0.1,
        ref_log_probs=below + 0.1,
        sample_weights=torch.linspace(0.5, 1.5, len(batch)),
        policy_mask=mask & (torch.arange(mask.shape[1]) != 2),
        length_quartiles=torch.arange(len(batch)) % 4,
        lag_buckets=(torch.arange(mask.shape[1]) % 3).to(torch.int8).expand(mask.shape),
    )


def loss_of(batch: TrainBatch) -> Callable[[TokenScores, TrainBatch], tuple[Tensor, dict[str, Metric]]]:
    """Return the loss of a whole mini-batch as the actor builds it."""
    denominators = Denominators.of(batch.response_mask)
    of_policy = None if batch.policy_mask is None else Denominators.of(batch.policy_mask & batch.response_mask)

    def loss(scores: TokenScores, part: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        share, metrics = policy_loss(scores.log_probs, scores.entropy, part, denominators, LOSS, of_policy)
        measured = engine_metrics(
            scores.log_probs.detach(), part.rollout_log_probs, part.response_mask, part.lag_buckets, "sequence"
        )
        return share, metrics | measured

    return loss


@contextlib.contextmanager
def _stage(name: str, stages: Stages) -> Iterator[None]:
    with counted() as stages[name]:
        yield


def _result(result: UpdateResult) -> Recorded:
    assert result.applied
    assert not any(
        isinstance(tensor, DeviceTensor) for metric in result.metrics.values() for tensor in vars(metric).values()
    )
    return {"loss": result.loss, "grad_norm": result.grad_norm, "metrics": to_floats(result.metrics)}


def _on_cpu(values: Any) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in values}


def _same(got: Any, want: Any, tolerance: float, place: str = "") -> None:
    """Compare results of the device with those of the CPU."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), place
        for name in want:
            _same(got[name], want[name], tolerance, f"{place}/{name}")
        return
    assert not isinstance(got, DeviceTensor), f"{place}: is still on the device"
    if want is not None:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{place}: {text}")


def _twice(run: Callable[[Stages], Recorded], tolerance: float) -> Stages:
    """Run on the CPU and on the device, and compare what was recorded."""
    install()  # before any backward pass: autograd counts the devices in the first one
    want = run({})
    stages: Stages = {}
    with device():
        got = run(stages)
    _same(got, want, tolerance)
    return stages


def _trainer(engine: str, setup: ModelSetup, config: dict[str, Any]) -> TrainStrategy:
    if engine == "hf":
        return HfTrain(setup, OPTIMIZER, HfConfig(**config))
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    return MegatronTrain(setup, OPTIMIZER, MegatronConfig(**config))


def policy(engine: str, folder: Path, config: dict[str, Any], bf16: bool, routing: dict[str, bool]) -> Stages:
    """Score, update with 2 and 3 micro-batches, export, save, update, load and update again."""
    setup = replace(model_setup(folder, torch.bfloat16 if bf16 else torch.float32), **routing)

    def run(stages: Stages) -> Recorded:
        trainer, recorded = _trainer(engine, setup, config), {}
        with _stage("score", stages):
            scores = trainer.score(sequences(), entropy=True)
        recorded["scores"] = scores._asdict()
        batch = replace(batch_of_everything(), routed_experts=scores.routed_experts)
        for size in (3, 2):
            with _stage(f"update {6 // size}", stages):
                result = trainer.update(batch.split(size), loss_of(batch), True)
            recorded[f"update {6 // size}"] = _result(result)
        with _stage("weights", stages):
            recorded["weights"] = _on_cpu(trainer.weights())
        with TemporaryDirectory() as state:
            trainer.save(Path(state), asynchronous=True)
            trainer.finish_save()
            batch = replace(batch_of_everything(2), routed_experts=scores.routed_experts)
            trainer.update(batch.split(3), loss_of(batch), True)
            trainer.load(Path(state))
        recorded["loaded"] = _on_cpu(trainer.weights())
        recorded["resumed"] = _result(trainer.update(batch.split(3), loss_of(batch), True))
        with TemporaryDirectory() as exported:
            trainer.save_hf(Path(exported))
        return recorded

    return _twice(run, 0.05 if bf16 else 2e-4)


def critic(engine: str, folder: Path) -> Stages:
    """Compute values, update with 2 and 3 micro-batches, save and load."""

    def run(stages: Stages) -> Recorded:
        if engine == "hf":
            made: Any = HfValue(model_setup(folder), OPTIMIZER, HfConfig())
        else:
            from roll_gspo.strategies.megatron.engine import MegatronValue

            made = MegatronValue(model_setup(folder), OPTIMIZER, MegatronConfig())
        recorded: Recorded = {}
        batch = value_batch()
        denominators, settings = Denominators.of(batch.response_mask), ValueLossSettings(0.2)
        for size in (3, 2):
            with _stage(f"update {6 // size}", stages):
                result = made.update(
                    batch.split(size), lambda values, part: value_loss(values, part, denominators, settings)
                )
            recorded[f"update {6 // size}"] = _result(result)
        with _stage("values", stages):
            recorded["values"] = made.values(sequences())
        with TemporaryDirectory() as state:
            made.save(Path(state))
            made.load(Path(state))
        return recorded | {"loaded": made.values(sequences())}

    return _twice(run, 2e-4)


def frozen(engine: str, folder: Path, config: dict[str, Any]) -> Stages:
    """Score with a reference; replace the weights of an hf engine by a trainer's and generate."""

    def run(stages: Stages) -> Recorded:
        if engine == "megatron":
            from roll_gspo.strategies.megatron.engine import MegatronInfer

            reference: Any = MegatronInfer(model_setup(folder), MegatronConfig(**config))
        else:
            reference = HfInfer(model_setup(folder), HfConfig(**config))
        with _stage("score", stages):
            recorded = {"scores": reference.score(sequences())._asdict()}
        if engine == "hf":
            reference.update_weights(_trainer("hf", model_setup(folder), {}).weights(), 1)
            sampling = Sampling(2, 5, top_p=0.9, top_k=20, stop_token_ids=(1,))
            with _stage("generate", stages):
                groups = reference.generate([[5, 6, 7], [8, 9]], sampling, [1, 2])
            flat = [completion for group in groups for completion in group]
            assert all(0 < len(completion.token_ids) <= 5 for completion in flat)
            recorded["generated"] = {
                str(number): torch.tensor([*c.token_ids, *c.log_probs]) for number, c in enumerate(flat)
            }
        return recorded

    return _twice(run, 2e-4)


def planted(engine: str, folder: Path) -> str:
    """Update with advantages that stayed on the CPU and return the error."""
    original = TrainBatch.to
    with device():
        trainer, batch = _trainer(engine, model_setup(folder), {}), batch_of_everything()
        TrainBatch.to = lambda self, target: replace(original(self, target), advantages=self.advantages)  # type: ignore[method-assign]
        try:
            trainer.update(batch.split(2), loss_of(batch), True)
        except MixedDevices as error:
            return str(error)
        finally:
            TrainBatch.to = original  # type: ignore[method-assign]
    raise AssertionError("a tensor of the CPU was mixed in, and nothing failed")
