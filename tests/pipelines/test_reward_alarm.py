from __future__ import annotations

import pytest

from roll_gspo.batch import Prompt
from roll_gspo.errors import RewardError
from roll_gspo.pipelines.rlvr.reward_alarm import FailedSteps, FirstSample, RewardAlarm
from roll_gspo.pipelines.rlvr.reward_metrics import component_metrics, count_by_domain, domain_metrics
from roll_gspo.rewards.base import RewardResult
from roll_gspo.tracking.names import metric_info


def told(caplog: pytest.LogCaptureFixture, alarm: RewardAlarm, step: int, **scores: list[float | None]) -> list[str]:
    """Return the warnings of a step; None is a failed sample."""
    caplog.clear()
    domains = [domain for domain, found in scores.items() for _ in found]
    results = [
        RewardResult(0.0, "KeyError: 'x'" if index else "timeout after 1 s") if score is None else RewardResult(score)
        for found in scores.values()
        for index, score in enumerate(found)
    ]
    alarm.check(step, domains, results)
    return [record.getMessage() for record in caplog.records]


def test_scores_that_stay_equal_are_told_after_three_steps_and_then_ever_more_seldom(caplog) -> None:
    alarm = RewardAlarm()
    lines = {step: told(caplog, alarm, step, maths=[0.0, 0.0], code=[0.0, 1.0]) for step in range(1, 14)}
    assert [step for step, found in lines.items() if found] == [3, 6, 12]
    assert lines[3][0].startswith("step 3: rewards.maths: all scores were equal in each of the last 3 steps (now 0, 2 ")
    assert "too hard" in lines[3][0] and "ground_truth" in lines[3][0]


def test_a_step_with_different_scores_ends_the_count(caplog) -> None:
    alarm = RewardAlarm()
    steps = [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5, None], [1.0, 1.0]]
    lines = [told(caplog, alarm, step, maths=scores) for step, scores in enumerate(steps)]
    assert [bool(found) for found in lines] == [False] * 5 + [True]
    assert "too easy" in lines[5][0]


def test_more_than_half_failed_is_told_with_the_most_frequent_reason(caplog) -> None:
    alarm = RewardAlarm()
    assert told(caplog, alarm, 1, maths=[None, 1.0, None, 0.0]) == [], "half is not more than half"
    (line,) = told(caplog, alarm, 2, maths=[None, None, None, 0.0])
    assert line.startswith(
        "step 2: rewards.maths: 3 of 4 samples failed and are not trained on, most often (2 times): "
    )
    assert "KeyError: 'x'" in line and "timeout_s" in line
    assert [bool(told(caplog, alarm, step, maths=[None])) for step in range(3, 7)] == [True, False, True, False]


def test_metrics_by_domain_and_component_hand_computed() -> None:
    names, domains = ["a", "b", "c"], ["a", "b", "a", "b"]
    results = [
        RewardResult(1.0, None, None, {"form": 1.0}),
        RewardResult(0.0, "hung"),
        RewardResult(0.5),
        RewardResult(0.0, "hung"),
    ]
    found = domain_metrics(names, domains, results, [10, 3, 20, 5])
    assert found == {
        "domain/a/num_samples": 2,
        "domain/a/failed": 0,
        "domain/a/score_mean": 0.75,
        "domain/a/response_length_mean": 15,
        "domain/b/num_samples": 2,
        "domain/b/failed": 2,
        "domain/b/response_length_mean": 4,
        "domain/c/num_samples": 0,
        "domain/c/failed": 0,
    }
    assert component_metrics(results) == {"reward/component/form": 1.0}
    assert count_by_domain(names, ["b", "b"], "groups_dropped")["domain/b/groups_dropped"] == 2
    assert domain_metrics(["a"], ["a"], results[:1], [1]) == {}, "one domain is all there is"
    for name in (*found, "reward/component/form", "domain/b/groups_dropped"):
        assert metric_info(name) is not None, name
    assert metric_info("domain/a/no_such_thing") is None


def failing_steps(limit: int | None, kinds: str) -> None:
    """Check steps of two samples: `f` where both fail, `s` where one has a score."""
    steps = FailedSteps(limit)
    prompt = Prompt((1,), "2+2=", {"id": "row 9", "ground_truth": "4"})
    trace = '  File "/home/me/my_reward.py", line 3, in score\n    return answers[response]\n'
    failed = RewardResult(0.0, "KeyError: '5'", traceback=trace)
    for step, kind in enumerate(kinds, start=1):
        results = [failed, failed if kind == "f" else RewardResult(1.0)]
        steps.check(step, "sums", results, lambda: FirstSample(prompt, "it is 5"))


def test_run_stops_after_steps_without_any_score() -> None:
    with pytest.raises(RewardError) as caught:
        failing_steps(3, "ffsfff")
    text = str(caught.value)
    assert text.startswith("step 6: all 2 rewards failed in each of the last 3 steps (max_failed_reward_steps 3)")
    for part in ("rewards.sums", "KeyError: '5'", 'my_reward.py", line 3', "row row 9", "'it is 5'"):
        assert part in text


@pytest.mark.parametrize(("limit", "kinds"), [(3, "ffsffs"), (None, "ffffffff")])
def test_run_goes_on_with_some_scores_or_without_a_limit(limit: int | None, kinds: str) -> None:
    failing_steps(limit, kinds)
