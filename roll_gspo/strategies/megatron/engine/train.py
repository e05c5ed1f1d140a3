"""Training a policy with megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from roll_gspo.algorithms.routing import expert_difference
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import (
    LossFunction,
    ModelSetup,
    OptimizerSetup,
    TokenScores,
    UpdateResult,
    WeightSource,
)
from roll_gspo.strategies.gathering import write_by_first_rank
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.model import build_model
from roll_gspo.strategies.megatron.engine.packed_layout import PackedLayout
from roll_gspo.strategies.megatron.engine.router_replay import Routers
from roll_gspo.strategies.megatron.engine.scores import chosen_experts, score, scores_of_rows
from roll_gspo.strategies.megatron.engine.trainer import MegatronTrainer
from roll_gspo.strategies.megatron.engine.weights import MegatronWeights
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints


class MegatronTrain(TrainerCheckpoints[MegatronTrainer]):
    """`TrainStrategy` of a checkpoint.

    Args:
        model, optimizer, strategy_config: see `ModelSetup`, `OptimizerSetup`, `MegatronConfig`.

    Raises:
        ConfigError: the layout or the model is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: MegatronConfig) -> None:
        self._model = build_model(model, strategy_config)
        self._replays = model.replay_routing
        self._routers: Routers | None = None
        if model.replay_routing or model.record_routing:
            self._routers = Routers(self._model.chunks[0])
        self._trainer = MegatronTrainer(self._model, optimizer)
        self._state = self._trainer.state

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample with the current weights, without gradient. The result is float32 on the CPU."""
        self._state.need(Residency.WEIGHTS, "score")
        self._trainer.finish_gather()
        return score(self._model, sequences, entropy, self._routers)

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")

        def share(rows: Tensor, packed_layout: PackedLayout, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            value, metrics = loss(scores_of_rows(self._model, rows, packed_layout, entropy), batch)
            return value, metrics | self._routing_metrics(batch)

        return self._trainer.update(micro_batches, share, self._prescribe)

    def _prescribe(self, batch: TrainBatch | None) -> None:
        """Set the experts of the next pass if the routers replay."""
        if self._routers is not None:
            self._routers.prescribe(None if batch is None else self._prescribed(batch))

    def _prescribed(self, batch: TrainBatch) -> Tensor | None:
        """Return [B, S, L, K] that the routers replay. They choose freely on padding and unrecorded tokens."""
        if not self._replays:
            return None
        if batch.routed_experts is None:
            raise TrainingError("router replay: the batch holds no routed_experts; record them first")
        return batch.routed_experts

    def _routing_metrics(self, batch: TrainBatch) -> dict[str, Metric]:
        """Return metrics of the last pass: replayed experts, and choices in which the routers now differ."""
        routers, recorded = self._routers, batch.routed_experts
        if routers is None or recorded is None:
            return {}
        positions, metrics = batch.sequences.predicting_mask, {}
        if self._replays:
            routers.check_replayed(recorded)
            replayed = (recorded >= 0).all(-1) & positions[:, :, None]
            metrics["routing/replayed_fraction"] = Metric(replayed.sum().double(), positions.sum() * recorded.shape[2])
        chosen = chosen_experts(routers, batch.sequences)
        metrics["routing/update_shift"] = expert_difference(chosen, recorded, positions)
        return metrics

    def weights(self) -> WeightSource:
        """Return the live weights under checkpoint names."""
        self._state.need(Residency.WEIGHTS, "export weights")
        self._trainer.finish_gather()
        return MegatronWeights(self._model.chunks, self._model.architecture, source=self._model.setup.checkpoint)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint.

        Rank 0 writes the files and reads them back. Every rank takes part in the export and waits for the outcome.

        Raises:
            CheckpointError: rank 0 could not write; raised on every rank.
        """
        write_by_first_rank(folder, self._model.setup, self.weights())
