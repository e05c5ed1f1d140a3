from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from roll_gspo.algorithms.kl import AdaptiveKLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.errors import CheckpointError
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.pipelines.state import FILE


def state(num_items: int = 10) -> RlvrState:
    items = [chr(97 + i) for i in range(num_items)]
    return RlvrState(0, PromptSampler(items, seed=3), RunningMoments(), AdaptiveKLController(0.1, 0.05, 100))  # type: ignore[arg-type]


def test_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    original = state()
    original.step = 7
    original.sampler.next_batch(13)
    original.running_moments.update(torch.tensor([0.1, 0.7, 0.4]))
    assert original.kl_controller is not None
    original.kl_controller.update(1.0, 32)
    original.save(tmp_path)
    restored = state()
    restored.load(tmp_path)
    assert restored.step == 7 and restored.metrics() == {"data/epoch": 1.0}
    assert restored.sampler.next_batch(20) == original.sampler.next_batch(20)
    assert restored.running_moments.state_dict() == original.running_moments.state_dict()
    assert restored.kl_controller is not None and restored.kl_controller.kl_coef == original.kl_controller.kl_coef


def test_other_data_or_a_torn_file_is_an_error(tmp_path: Path) -> None:
    state().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"9 prompts, .*10"):
        state(9).load(tmp_path)
    (tmp_path / FILE).write_text('{"step": 1')
    with pytest.raises(CheckpointError, match="cannot be read"):
        state().load(tmp_path)
    (tmp_path / FILE).write_bytes(pickle.dumps(state().state_dict()))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / FILE}: cannot be read"):
        state().load(tmp_path)
