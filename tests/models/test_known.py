"""Parameters of well-known models, from their shapes."""

from __future__ import annotations

import pytest

from roll_gspo.models.known import known_config
from roll_gspo.models.size import architecture_of, context_length_of, size_of

# Parameters that the model cards state, in billions; a tied head counts once.
PUBLISHED = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B-Base": 1.7,
    "Qwen3-4B-Instruct-2507": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B-Base": 30.5,
    "Qwen3-235B-A22B": 235,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shape_of_a_known_model_has_its_published_parameters(name: str) -> None:
    size, model = size_of(f"Qwen/{name}"), architecture_of(f"Qwen/{name}")
    assert size is not None and model is not None and size.source == "known by name"
    assert size.num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)
    assert bool(size.num_expert_parameters) == (model.experts is not None) == ("-A" in name)


def test_other_names_are_not_known() -> None:
    for name in ("Qwen/Qwen2.5-Math-7B", "Qwen/Qwen3-5B", "other/Qwen3-8B", "Qwen/Qwen3-8B-FP8"):
        assert known_config(name) is None
    assert context_length_of("Qwen/Qwen3-8B") is None, "variants of a size differ in it"
