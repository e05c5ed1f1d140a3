"""The experts of a tiny mixture of experts: recorded by vLLM and Megatron, replayed by Megatron, counted everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import model_setup, optimizer_setup, policy_loss, sequences, train_batch, weights_of
from tiny_models import FAMILIES, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from roll_gspo.batch import Prompt, Rollouts, Sequences, TrainBatch
from roll_gspo.errors import ConfigError, TrainingError
from roll_gspo.metrics import to_floats
from roll_gspo.strategies.base import OptimizerSetup, Sampling
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.vllm.config import VllmConfig

pytestmark = pytest.mark.megatron

Checkpoints = Callable[[str], Path]
L, K, NUM_EXPERTS = 2, 2, 4


def engine(
    checkpoint: Checkpoints,
    family: str = "qwen3_moe",
    config: MegatronConfig | None = None,
    optimizer: OptimizerSetup | None = None,
    **routing: bool,
):
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    setup = replace(model_setup(checkpoint(family)), **routing)
    return MegatronTrain(setup, optimizer or optimizer_setup(), config or MegatronConfig())


def transformers_experts(tokens: Sequences, model: PreTrainedModel | None = None) -> Tensor:
    """[B, S, L, K] of the reference implementation, order of the K by weight; -1 on padding."""
    model = model or build_model("qwen3_moe")
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, output_router_logits=True).router_logits
    rows = torch.stack([layer.view(*tokens.input_ids.shape, NUM_EXPERTS).topk(K).indices for layer in logits], 2)
    return rows.masked_fill(~tokens.attention_mask[:, :, None, None], -1).to(torch.int16)


def same_sets(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None and b is not None
    return torch.equal(a.sort(-1).values.long(), b.sort(-1).values.long())


def with_heads_for_vllm(folder: Path, family: str) -> Path:
    """vLLM's attention on a CPU starts at heads of 32."""
    model_class, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


def forced(tokens: Sequences, experts: tuple[int, ...] = (0, 3)) -> Tensor:
    """[B, S, L, K]: these experts for every token."""
    rows = torch.tensor(experts, dtype=torch.int16).expand(*tokens.input_ids.shape, L, K)
    return rows.masked_fill(~tokens.attention_mask[:, :, None, None], -1)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_unnormalised"])
def test_megatron_records_the_experts_that_transformers_chooses(checkpoint: Checkpoints, family: str) -> None:
    tokens = sequences()
    scores = engine(checkpoint, family, record_routing=True).score(tokens)
    assert scores.routed_experts is not None and scores.routed_experts.dtype == torch.int16
    assert same_sets(scores.routed_experts, transformers_experts(tokens, build_model(family)))


def test_recording_changes_nothing(checkpoint: Checkpoints) -> None:
    plain, recording = engine(checkpoint), engine(checkpoint, record_routing=True)
    a, b = plain.score(sequences()), recording.score(sequences())
    assert torch.equal(a.log_probs, b.log_probs) and a.routed_experts is None
    batch = replace(train_batch(), routed_experts=b.routed_experts)
    results = [e.update(batch.split(2), policy_loss, True) for e in (plain, recording)]
    assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
    ours, theirs = weights_of(plain), weights_of(recording)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert to_floats(results[1].metrics)["routing/update_shift"] == 0, "nothing was updated yet"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_unnormalised"])
def test_replaying_what_the_routers_choose_anyway_changes_nothing(checkpoint: Checkpoints, family: str) -> None:
    free, replaying = (
        engine(checkpoint, family, optimizer=optimizer_setup(weight_decay=0.0, warmup_steps=0), replay_routing=is_on)
        for is_on in (False, True)
    )
    recorded = replaying.score(sequences()).routed_experts
    want = free.update(train_batch().split(2), policy_loss, True)
    got = replaying.update(replace(train_batch(), routed_experts=recorded).split(2), policy_loss, True)
    assert (got.loss, got.grad_norm) == (want.loss, want.grad_norm)
    ours, theirs = weights_of(replaying), weights_of(free)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "gradients are the same, one by one"
    figures = to_floats(got.metrics)
    assert figures["routing/replayed_fraction"] == 1 and figures["routing/update_shift"] == 0


@pytest.mark.parametrize(
    "config",
    [
        MegatronConfig(),
        MegatronConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    ],
    ids=["plain", "recomputed"],
)
def test_forced_experts_are_those_that_are_computed(checkpoint: Checkpoints, config: MegatronConfig) -> None:
    """One pair of experts for every token leaves the others without gradient and shows the shift of the router."""
    replaying = engine(checkpoint, config=config, replay_routing=True)
    batch = replace(train_batch(), routed_experts=forced(sequences()))
    before = weights_of(replaying)
    result = replaying.update(batch.split(4), policy_loss, True)
    assert result.applied
    after = weights_of(replaying)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    decayed_only = {
        name
        for name in changed
        if ".experts." in name and torch.allclose(after[name], before[name] * (after[name] / before[name]).median())
    }
    touched = {name.split(".experts.")[1].split(".")[0] for name in changed - decayed_only if ".experts." in name}
    assert touched == {"0", "3"}
    assert any(name.endswith("mlp.gate.weight") for name in changed), "the gate learns through the replayed experts"
    assert 0 < to_floats(result.metrics)["routing/update_shift"] < 1, "the choices without replay"


def test_replay_holds_the_old_experts_after_the_weights_have_changed(checkpoint: Checkpoints) -> None:
    replaying, free = engine(checkpoint, replay_routing=True), engine(checkpoint, record_routing=True)
    recorded = replaying.score(sequences()).routed_experts
    batch = replace(train_batch(), routed_experts=recorded)
    shifts = {}
    for name, e in (("replaying", replaying), ("free", free)):
        for _ in range(4):
            figures = to_floats(e.update(batch.split(3), policy_loss, True).metrics)
        shifts[name] = figures["routing/update_shift"]
        now = e.score(sequences()).routed_experts
        assert now is not None and recorded is not None and not same_sets(now, recorded), "the routers have moved"
    assert all(shift > 0 for shift in shifts.values()), "what they would choose is seen either way"


def test_rows_that_were_not_recorded_are_chosen_freely(checkpoint: Checkpoints) -> None:
    replaying, free = engine(checkpoint, replay_routing=True), engine(checkpoint)
    nothing = torch.full_like(forced(sequences()), -1)
    want = free.update(train_batch().split(2), policy_loss, True)
    got = replaying.update(replace(train_batch(), routed_experts=nothing).split(2), policy_loss, True)
    assert got.loss == want.loss
    assert to_floats(got.metrics)["routing/replayed_fraction"] == 0


def test_record_that_does_not_fit_is_refused(checkpoint: Checkpoints) -> None:
    replaying = engine(checkpoint, replay_routing=True)
    with pytest.raises(TrainingError, match="holds no routed_experts"):
        replaying.update(train_batch().split(3), policy_loss, True)
    wrong = forced(sequences())
    for record, said in (
        (wrong[:, :, :1], "experts of 1 layers were recorded, the model has 2"),
        (wrong[:, :-1], "choices were recorded, the pass has"),
        (wrong[..., :1], "choices were recorded, the pass has"),
    ):
        with pytest.raises(TrainingError, match=said):
            replaying.update([replace(train_batch(), routed_experts=record)], policy_loss, True)


@pytest.mark.parametrize("row", [(1, 1), (-1, 1), (0, NUM_EXPERTS), (-2, 1)])
def test_row_that_names_no_two_experts_is_refused(checkpoint: Checkpoints, row: tuple[int, int]) -> None:
    """A token would go to fewer experts than the model was made for, or to one that is none."""
    record = forced(sequences())
    record[1, 3, 1] = torch.tensor(row, dtype=torch.int16)
    replaying = engine(checkpoint, replay_routing=True)
    said = rf"sample 1, position 3, layer 1 .* \[{row[0]}, {row[1]}\], which are not 2"
    with pytest.raises(TrainingError, match=said):
        replaying.update([replace(train_batch(), routed_experts=record)], policy_loss, True)


def test_layer_that_does_not_replay_is_named(checkpoint: Checkpoints) -> None:
    """Simulate a megatron-core that no longer requests the experts."""
    replaying = engine(checkpoint, replay_routing=True)
    routers = [m for m in replaying._model.chunks[0].modules() if m.__class__.__name__ == "TopKRouter"]
    batch = replace(train_batch(), routed_experts=replaying.score(sequences()).routed_experts)
    routers[1].router_replay = None  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"layer 1 replayed 0 of \d+ recorded choices"):
        replaying.update(batch.split(3), policy_loss, True)


def test_count_is_of_the_map_that_tokens_are_dispatched_by() -> None:
    """Expert 3 was asked for and is missing from the map: 3 of 4 choices; the second token was free."""
    from roll_gspo.strategies.megatron.engine.router_replay import LayerRoutes

    routes = LayerRoutes()
    routes.prescribe(torch.tensor([[0, 1], [-1, -1], [2, 3]]))
    scores = torch.rand(3, NUM_EXPERTS)
    routes.get_replay_topk(scores, 2, default_compute_topk=lambda scores, topk, *_: scores.topk(topk))
    sent = torch.tensor([[True, True, False, False], [True, False, False, True], [True, False, True, False]])
    routes.count(torch.nn.Identity(), (), (scores, sent))
    assert int(routes.num_replayed) == 3


def test_checkpoints_with_and_without_replay_are_the_same(checkpoint: Checkpoints, tmp_path: Path) -> None:
    replaying, free = engine(checkpoint, replay_routing=True), engine(checkpoint)
    batch = replace(train_batch(), routed_experts=replaying.score(sequences()).routed_experts)
    replaying.update(batch.split(3), policy_loss, True)
    replaying.save(tmp_path)
    free.load(tmp_path)
    assert torch.equal(replaying.score(sequences()).log_probs, free.score(sequences()).log_probs)
    replaying.load(tmp_path)
    assert replaying.update(batch.split(3), policy_loss, True).applied


def test_models_of_one_process_do_not_disturb_each_other(checkpoint: Checkpoints) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from roll_gspo.strategies.megatron.engine import MegatronInfer

    replaying, other = engine(checkpoint, replay_routing=True), engine(checkpoint, record_routing=True)
    reference = MegatronInfer(model_setup(checkpoint("qwen3_moe")), MegatronConfig())
    want = reference.score(sequences()).log_probs
    batch = replace(train_batch(), routed_experts=forced(sequences()))
    replaying.update(batch.split(3), policy_loss, True)
    assert torch.equal(reference.score(sequences()).log_probs, want)
    assert same_sets(other.score(sequences()).routed_experts, transformers_experts(sequences()))
    assert not RouterReplay.global_router_replay_instances


def test_dense_model_has_nothing_to_record(checkpoint: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="it is not a mixture of experts"):
        engine(checkpoint, "qwen3_tied", record_routing=True)


@pytest.mark.vllm
def test_vllm_records_the_experts_of_every_token_and_megatron_replays_them(tmp_path: Path) -> None:
    from roll_gspo.strategies.megatron.engine import MegatronTrain
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    folder = with_heads_for_vllm(tmp_path, "qwen3_moe")
    trainer = MegatronTrain(replace(model_setup(folder), replay_routing=True), optimizer_setup(), MegatronConfig())
    config = VllmConfig(kv_cache_memory_mb=64, max_num_seqs=3)
    generator = VllmGenerate(model_setup(folder), config, max_model_len=64, record_routed_experts=True)
    try:
        generator.update_weights(trainer.weights(), 0)
        prompts = [Prompt((5, 6, 7, 8), "", {}), Prompt((9, 10), "", {}), Prompt((11, 12, 13), "", {})]
        sampling = Sampling(num_samples=2, max_new_tokens=9, temperature=0.7, stop_token_ids=(1,))
        found = [generator.generate([p.token_ids for p in prompts], sampling, [1, 11, 21]) for _ in range(2)]
    finally:
        generator.shutdown()
    assert str(found[0]) == str(found[1]), "a second call records anew"
    rollouts = Rollouts.collate(prompts, found[0], pad=0, weights_version=0)
    experts = rollouts.routed_experts
    assert experts is not None
    tokens = rollouts.sequences
    for row, completion in enumerate(rollouts.completions):
        recorded = completion.routed_experts
        assert recorded is not None and len(recorded) == int(tokens.lengths[row]) - 1
    seen = (experts >= 0).all(-1)
    for own in (
        trainer.score(tokens).routed_experts,
        transformers_experts(tokens, AutoModelForCausalLM.from_pretrained(folder)),
    ):
        assert own is not None
        assert same_sets(torch.where(seen[..., None], own, -1), experts)
    mask = tokens.response_mask
    zeros = torch.zeros(mask.shape)
    batch = TrainBatch(tokens, torch.arange(6), torch.ones(mask.shape), zeros, zeros, routed_experts=experts)
    figures = to_floats(trainer.update(batch.split(3), policy_loss, True).metrics)
    assert figures["routing/replayed_fraction"] == 1 and figures["routing/update_shift"] == 0


@pytest.mark.vllm
def test_vllm_records_requests_that_were_preempted(tmp_path: Path) -> None:
    """A cache of 16 blocks for 24 sequences of two: some lose their blocks and are computed anew."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    folder = with_heads_for_vllm(tmp_path, "qwen3_moe")
    trainer = MegatronTrain(replace(model_setup(folder), record_routing=True), optimizer_setup(), MegatronConfig())
    config = VllmConfig(kv_cache_memory_mb=1, max_num_seqs=24)
    generator = VllmGenerate(model_setup(folder), config, max_model_len=160, record_routed_experts=True)
    try:
        generator.update_weights(trainer.weights(), 0)
        prompts = [Prompt(tuple(range(3, 5 + i % 5)), "", {}) for i in range(24)]
        found = generator.generate([p.token_ids for p in prompts], Sampling(1, 150), list(range(24)))
    finally:
        generator.shutdown()
    rollouts = Rollouts.collate(prompts, found, pad=0, weights_version=0)
    own, experts = trainer.score(rollouts.sequences).routed_experts, rollouts.routed_experts
    assert own is not None and experts is not None
    assert same_sets(torch.where((experts >= 0), own, -1), experts)


@pytest.mark.vllm
def test_experts_that_vllm_returns_itself_must_be_of_every_token() -> None:
    """Test the CUDA path on vLLM's result types only."""
    import numpy as np
    from vllm.outputs import CompletionOutput, RequestOutput

    from roll_gspo.strategies.vllm.engine.routed_experts import ReturnedExperts

    def answer(rows: np.ndarray | None) -> RequestOutput:
        completion = CompletionOutput(0, "", [7, 8, 1], None, None, routed_experts=rows, finish_reason="stop")
        return RequestOutput("5", None, [3, 4], None, [completion], finished=True)

    rows = np.arange(4 * L * K, dtype=np.uint8).reshape(4, L, K)
    experts = ReturnedExperts().take(answer(rows))
    assert experts.dtype == torch.int16 and experts.tolist() == rows.tolist()
    for incomplete in (None, rows[1:]):
        with pytest.raises(RuntimeError, match=r"request 5 .* [03] tokens instead of 4"):
            ReturnedExperts().take(answer(incomplete))


@pytest.mark.vllm
def test_vllm_has_nothing_to_record_of_a_dense_model(tmp_path: Path) -> None:
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    folder = with_heads_for_vllm(tmp_path, "qwen3_tied")
    config = VllmConfig(kv_cache_memory_mb=64, max_num_seqs=3)
    with pytest.raises(ConfigError, match="it is not a mixture of experts"):
        VllmGenerate(model_setup(folder), config, max_model_len=64, record_routed_experts=True)
