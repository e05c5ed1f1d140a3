from __future__ import annotations

import math

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup
from tiny_models import EOS, VOCAB

from roll_gspo.batch import Completion, Sequences
from roll_gspo.errors import DataError, WeightTransferError
from roll_gspo.strategies.base import ModelSetup, Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.sampling import draw, sampling_log_probs, uniforms
from roll_gspo.strategies.hf.train import HfTrain

PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15], [20, 21]]
SEEDS = [100, 200, 300, 400]


def _engine(checkpoint: Checkpoints, batch_size: int = 256, family: str = "qwen3_tied") -> HfInfer:
    return HfInfer(model_setup(checkpoint(family)), HfConfig(generate_batch_size=batch_size))


def _flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe", "llama"])
def test_generated_log_probs_equal_scoring(checkpoint: Checkpoints, family: str) -> None:
    folder = checkpoint(family)
    engine = HfInfer(ModelSetup(folder, torch.float32, 3, temperature=0.8, seed=0), HfConfig())
    sampling = Sampling(num_samples=4, max_new_tokens=20, temperature=0.8, stop_token_ids=(EOS, 17))
    completions = _flat(engine.generate(PROMPTS, sampling, SEEDS))
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    batch = Sequences.collate(prompts, [c.token_ids for c in completions], pad=0)
    scored = engine.score(batch).log_probs
    for row, completion in enumerate(completions):
        want = scored[row, : len(completion.token_ids)]
        torch.testing.assert_close(torch.tensor(completion.log_probs), want, rtol=0, atol=1e-4)
        ended = completion.token_ids[-1] in (EOS, 17)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not {EOS, 17} & set(completion.token_ids[:-1])
        assert ended or len(completion.token_ids) == 20
    assert len({c.token_ids for c in completions}) > 8
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_samples_depend_on_their_seed_only(checkpoint: Checkpoints) -> None:
    sampling = Sampling(num_samples=3, max_new_tokens=12)
    together = _engine(checkpoint).generate(PROMPTS, sampling, SEEDS)
    in_pairs = _engine(checkpoint, batch_size=2).generate(PROMPTS, sampling, SEEDS)
    alone = _engine(checkpoint).generate([PROMPTS[2]], Sampling(1, 12), [SEEDS[2] + 1])
    tokens = [[c.token_ids for c in group] for group in together]
    assert tokens == [[c.token_ids for c in group] for group in in_pairs]
    assert alone[0][0].token_ids == tokens[2][1]
    other = _engine(checkpoint).generate(PROMPTS, sampling, [seed + 50 for seed in SEEDS])
    assert tokens != [[c.token_ids for c in group] for group in other]


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -3.0, 0.5]])
    log_probs = sampling_log_probs(logits, Sampling(1, 1, temperature=0.7)).expand(20000, -1)
    tokens = draw(log_probs, uniforms(range(20000), 1)[:, 0], greedy=False)
    shares = torch.bincount(tokens, minlength=5) / 20000
    torch.testing.assert_close(shares, log_probs[0].exp(), rtol=0, atol=0.012)  # > 3 standard deviations


def test_top_k_and_top_p_renormalise_what_they_keep() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    top_k = sampling_log_probs(logits, Sampling(1, 1, top_k=2)).exp()
    torch.testing.assert_close(top_k, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    # 0.4 + 0.3 reach 0.65, so the third is cut away
    top_p = sampling_log_probs(logits, Sampling(1, 1, top_p=0.65)).exp()
    torch.testing.assert_close(top_p, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    both = sampling_log_probs(logits, Sampling(1, 1, top_k=3, top_p=0.5)).exp()
    torch.testing.assert_close(both, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert sampling_log_probs(logits, Sampling(1, 1, top_p=1e-9)).exp()[0, 1] == 1
    whole = sampling_log_probs(logits, Sampling(1, 1, top_k=-1)).exp()
    torch.testing.assert_close(whole, logits.exp())


def test_greedy_takes_the_most_probable_token_whatever_the_seed(checkpoint: Checkpoints) -> None:
    sampling = Sampling(num_samples=2, max_new_tokens=6, temperature=0.0)
    completions = _flat(_engine(checkpoint).generate(PROMPTS, sampling, SEEDS))
    again = _flat(_engine(checkpoint).generate(PROMPTS, sampling, [1, 2, 3, 4]))
    assert [c.token_ids for c in completions] == [c.token_ids for c in again]
    assert all(math.isfinite(p) and p <= 0 for c in completions for p in c.log_probs)


def test_progress_counts_finished_samples_to_the_end(checkpoint: Checkpoints) -> None:
    calls: list[tuple[int, int]] = []
    sampling = Sampling(num_samples=2, max_new_tokens=12, stop_token_ids=tuple(range(1, 20)))
    _engine(checkpoint, batch_size=3).generate(PROMPTS, sampling, SEEDS, lambda *c: calls.append(c))
    assert calls[-1] == (8, 8) and [c[0] for c in calls] == sorted({c[0] for c in calls}) and len(calls) > 2


def test_each_sample_is_handed_out_once_when_it_ends(checkpoint: Checkpoints) -> None:
    handed: list[tuple[int, int, Completion]] = []
    counts: list[int] = []
    sampling = Sampling(num_samples=2, max_new_tokens=12, stop_token_ids=tuple(range(1, 20)))
    groups = _engine(checkpoint, batch_size=3).generate(
        PROMPTS, sampling, SEEDS, lambda done, _: counts.append(len(handed)), lambda *sample: handed.append(sample)
    )
    assert sorted((p, j) for p, j, _ in handed) == [(p, j) for p in range(4) for j in range(2)]
    assert all(groups[p][j] == completion for p, j, completion in handed)
    assert counts[-1] > 0, "some while others are still decoded"


def test_update_weights_refuses_what_does_not_fit(checkpoint: Checkpoints) -> None:
    engine = _engine(checkpoint, family="qwen3_moe")
    trainer = HfTrain(model_setup(checkpoint("qwen3_moe")), optimizer_setup(), HfConfig())
    good = list(trainer.weights())
    with pytest.raises(WeightTransferError, match=r"1 weights were not sent, e\.g\. 'model\.embed_tokens\.weight'"):
        engine.update_weights([pair for pair in good if "embed_tokens" not in pair[0]], 1)
    with pytest.raises(WeightTransferError, match=r"no weight 'model\.unknown'"):
        engine.update_weights([*good, ("model.unknown", torch.zeros(1))], 1)
    with pytest.raises(WeightTransferError, match=r"sent as \(3,\)"):
        engine.update_weights([("model.norm.weight", torch.zeros(3))], 1)


def test_unusable_prompts_are_refused(checkpoint: Checkpoints) -> None:
    engine = _engine(checkpoint)
    for prompts, message in (([], "no prompts"), ([[]], "prompt 0 has 0 tokens"), ([[VOCAB]], f"ends at {VOCAB - 1}")):
        with pytest.raises(DataError, match=message):
            engine.generate(prompts, Sampling(1, 1), [0] * len(prompts))


def test_draw_never_takes_a_token_that_was_cut_away() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(-1).expand(2, -1)
    below_one = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(log_probs, below_one, greedy=False).tolist() == [1, 3]
