"""Every combination of options that the axes of the algorithm allow has a plan, or is refused with a reason."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
from composed import load_config
from omegaconf import OmegaConf
from pydantic import ValidationError

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, EXTENSIBLE, POLICY_LOSSES
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.run import run, shipped_folders

GROUPS = shipped_folders()[1]
# In the order of base.yaml, which decides which file wins.
AXES = (
    *("adv_estimator", "importance_sampling", "policy_loss", "loss_agg_mode", "reward_norm", "kl", "query_filter"),
    *("train_infer_correction", "old_log_probs", "off_policy_mask", "token_mask"),
)
OPTIONS = {
    axis: sorted(EXTENSIBLE[axis] if axis in EXTENSIBLE else (file.stem for file in (GROUPS / axis).glob("*.yaml")))
    for axis in AXES
}
Choice = dict[str, str]


def expected_refusals(choice: Choice) -> set[str]:
    """Return the keys whose rules a combination breaks."""
    broken = set()
    if POLICY_LOSSES.declaration(choice["policy_loss"]).own_ratio and choice["importance_sampling"] != "token":
        broken.add("policy_loss")
    if choice["train_infer_correction"] != "none" and choice["old_log_probs"] == "rollout":
        broken.add("train_infer_correction")  # every weight would be 1
    if ADVANTAGE_ESTIMATORS.declaration(choice["adv_estimator"]).normalises_scores and choice["reward_norm"] != "none":
        broken.add("reward_norm")
    if choice["token_mask"] != "none" and choice["old_log_probs"] == "rollout":
        broken.add("top_entropy_quantile")  # no entropies
    return broken


def files_of(choice: Choice) -> list[Any]:
    """Return the parsed YAML of the chosen options."""
    return [OmegaConf.load(GROUPS / axis / f"{option}.yaml") for axis, option in choice.items()]


def fragments() -> dict[str, dict[str, dict[str, Any]]]:
    """Return axis -> option -> the keys that it sets, with interpolations resolved in base.yaml."""
    base = load_config("base").config.model_dump(mode="json")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for axis in AXES:
        for option in OPTIONS[axis]:
            (file,) = files_of({axis: option})
            keys = {str(key) for key in file}
            whole = OmegaConf.to_container(OmegaConf.merge({"actor_train": base["actor_train"]}, file), resolve=True)
            assert isinstance(whole, dict)
            found.setdefault(axis, {})[option] = {str(k): v for k, v in whole.items() if k in keys}
    return found


def combinations(estimator: str, number: int | None) -> list[Choice]:
    """Return `number` random combinations with this estimator, or all of them without masks if None."""
    if number is None:
        chosen = OPTIONS | {"adv_estimator": [estimator], "off_policy_mask": ["none"], "token_mask": ["none"]}
        return [dict(zip(AXES, options, strict=True)) for options in itertools.product(*chosen.values())]
    generator = random.Random(estimator)
    chosen = OPTIONS | {"adv_estimator": [estimator]}
    return [{axis: generator.choice(chosen[axis]) for axis in AXES} for _ in range(number)]


def pairs(choices: list[Choice]) -> set[tuple[tuple[str, str], ...]]:
    """Return the pairs of options of two axes that the combinations contain."""
    return {pair for choice in choices for pair in itertools.combinations(choice.items(), 2)}


def lines_of(error: ValidationError) -> list[str]:
    """Return the broken rules, one per line."""
    return [line for detail in error.errors() for line in str(detail.get("ctx", {}).get("error", detail)).splitlines()]


@pytest.mark.parametrize("number", [600, pytest.param(None, marks=pytest.mark.long, id="all")])
@pytest.mark.parametrize("estimator", OPTIONS["adv_estimator"])
def test_every_combination_of_the_axes_has_a_plan_or_a_reason(estimator: str, number: int | None) -> None:
    choices = combinations(estimator, number)
    if number is not None:
        options = [[(axis, option) for option in OPTIONS[axis]] for axis in AXES if axis != "adv_estimator"]
        every = {pair for two in itertools.combinations(options, 2) for pair in itertools.product(*two)}
        assert pairs(choices) >= every, "every pair of options occurs"
    parts = fragments()
    base = load_config("base").config
    chosen_by_axes = {key for options in parts.values() for keys in options.values() for key in keys}
    # Blocks that no axis touches are validated once.
    fixed = {key: value for key, value in base if key in base.model_fields_set and key not in chosen_by_axes}
    num_planned, reasons = 0, set()
    for choice in choices:
        values = dict(fixed)
        for axis, option in choice.items():
            values |= parts[axis][option]
        expected = expected_refusals(choice)
        try:
            config = ExperimentConfig.model_validate(values)
        except ValidationError as error:
            lines = lines_of(error)
            reasons |= {re.sub(r"importance_sampling: \w+", "importance_sampling", line) for line in lines}
            assert {re.split(r"\W", line)[0] for line in lines} == expected, (choice, lines)
            continue
        assert not expected, choice
        plan = make_plan(config)
        assert not plan.not_runnable
        num_planned += 1
    normalises = ADVANTAGE_ESTIMATORS.declaration(estimator).normalises_scores
    assert num_planned > len(choices) / (20 if normalises else 4)
    # Four losses with a ratio of the whole response, the correction, and the masks; three normalisations.
    assert len(reasons) == 5 + (number is not None) + 3 * normalises, reasons
    for line in reasons:
        assert re.match(r"[a-z_]+", line)[0] in ExperimentConfig.model_fields  # type: ignore[index]
        assert re.search(r"; (set|remove|lower|add) ", line), f"says no way out: {line}"


@pytest.mark.parametrize("seed", range(4))
def test_combination_is_the_same_through_hydra_and_dry_run(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROLL_GSPO_DRY_RUN", "1")
    parts = fragments()
    base = load_config("base").config
    fixed = {key: value for key, value in base if key in base.model_fields_set}
    generator = random.Random(seed)
    for _ in range(12):
        choice = {axis: generator.choice(OPTIONS[axis]) for axis in AXES}
        overrides = [f"{axis}={option}" for axis, option in choice.items()]
        if keys := expected_refusals(choice):
            with pytest.raises(ConfigError) as caught:
                load_config("base", *overrides)
            located = [re.match(r".*?(?:\): |yaml:\d+: )(\w+)", line) for line in str(caught.value).splitlines()]
            assert {match[1] if match else None for match in located} == keys
            continue
        loaded = load_config("base", *overrides)
        assert loaded.warnings == ()
        values = dict(fixed)
        for axis, option in choice.items():
            values |= parts[axis][option]
        assert loaded.config == ExperimentConfig.model_validate(values)
        assert run(loaded) == 0
        assert capsys.readouterr().out.strip() == make_plan(loaded.config).text()
