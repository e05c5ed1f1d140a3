"""The worker processes: hostile rewards, order, and that none of them is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roll_gspo.errors import ConfigError, MissingDependencyError, RewardError
from roll_gspo.rewards import RewardPool, RewardRequest, RewardResult, reward_spec
from roll_gspo.rewards.round import RoundCancelled

HOSTILE = """
import os, re, subprocess, sys, time
from roll_gspo.rewards import Verdict
def reward(prompt, response, ground_truth, **row):
    if response == "raise": raise KeyError("no such thing")
    if response == "nan": return float("nan")
    if response == "inf": return float("inf")
    if response == "large": return 1e39
    if response == "text": return "1.0"
    if response == "none": return None
    if response == "sys.exit": sys.exit(3)
    if response == "die": os._exit(3)
    if response == "segfault": os.kill(os.getpid(), 11)
    if response == "hang": time.sleep(600)
    if response == "hang in C": re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "spawn and hang":
        child = subprocess.Popen(["sleep", "600"])
        open(ground_truth, "w").write(str(child.pid))
        time.sleep(600)
    if response == "torch": return "torch" in sys.modules
    if response == "pid": return os.getpid()
    if response == "verdict": return Verdict(0.75, "42", {"right": 1, "form": 0.5})
    if response == "bad part": return Verdict(0.75, "42", {"right": float("nan")})
    if response == "bad answer": return Verdict(0.75, 42)
    print("a reward that prints")
    return float(response)
def slow(prompt, response, ground_truth): time.sleep(0.02); return os.getpid()
class Batch:
    def score_batch(self, requests):
        responses = [request.response for request in requests]
        for word in {"raise", "die", "hang"} & set(responses):
            reward("", word, "")
        if "short" in responses: return [1.0]
        if "not a list" in responses: return 1.0
        return [float("nan") if r == "nan" else "1" if r == "text" else len(requests) for r in responses]
def allocate(prompt, response, ground_truth): return len(bytearray(int(response) << 20)) >> 20
def oom_killed(prompt, response, ground_truth):
    if response == "large": os.kill(os.getpid(), 9)
    return float(int(open("/proc/self/oom_score_adj").read()))
class Broken:
    def __init__(self): raise OSError("no licence server")
class Dies:
    def __init__(self): os._exit(7)
class DiesWhenTold:
    def __init__(self):
        told = int(open("deaths").read())
        open("deaths", "w").write(str(max(0, told - 1)))
        if told: os.kill(os.getpid(), 9)
    def __call__(self, prompt, response, ground_truth): return reward(prompt, response, ground_truth)
class Sleeps:
    def __init__(self): time.sleep(600)
"""
TIMEOUT_S = 1.0


@pytest.fixture(autouse=True)
def hostile_module(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    (tmp_path / "wants_more.py").write_text("import a_package_that_is_not_there\ndef f(p, r, g): return 0")
    monkeypatch.chdir(tmp_path)  # where `python -m` would find it


def pool_of(target: str, num_workers: int = 2, **settings) -> RewardPool:
    return RewardPool(reward_spec(target, {}, "rewards.x"), num_workers, TIMEOUT_S, "rewards.x", **settings)


def ask(*responses: str, truth: str = "") -> list[RewardRequest]:
    return [RewardRequest("p", response, truth, {"id": str(i)}) for i, response in enumerate(responses)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"{[p for p in pids if alive(p)]} still run after {within_s} s"
        time.sleep(0.02)


def test_scores_keep_their_order_and_processes_are_reused():
    with pool_of("hostile.reward") as pool:
        for start in (0, 1000):
            results = pool.score(ask(*(str(n) for n in range(start, start + 300))))
            assert results == [RewardResult(float(n)) for n in range(start, start + 300)]
        first = set(pool.pids)
        assert {r.score for r in pool.score(ask(*["pid"] * 64))} <= first
        assert pool.score([]) == []


def test_a_verdict_says_more_than_a_number():
    with pool_of("hostile.reward") as pool:
        results = pool.score(ask("verdict", "1"))
        assert results == [RewardResult(0.75, None, "42", {"right": 1.0, "form": 0.5}), RewardResult(1.0)]


def test_batch_reward_gets_several_samples_at_once_but_not_more_than_allowed():
    with pool_of("hostile.Batch", num_workers=1, max_batch=4) as pool:
        assert [r.score for r in pool.score(ask(*["1"] * 10))] == [4] * 8 + [2] * 2


@pytest.mark.parametrize(
    ("hostile", "told", "num_failed"),
    [
        ("raise", "KeyError: 'no such thing'", 1),
        ("nan", "returned nan, not a finite number", 1),
        ("text", "returned '1', not a number", 1),
        ("die", "died (exit code 3)", 1),
        ("hang", "timeout after 1 s", 1),
        ("short", "returned 1 scores for 4 requests", 4),
        ("not a list", "TypeError", 1),
    ],
)
def test_hostile_batch_is_taken_apart_so_that_the_guilty_sample_fails(hostile, told, num_failed):
    with pool_of("hostile.Batch", num_workers=1, max_batch=4) as pool:
        results = pool.score(ask("1", "2", hostile, "3", "4", "5"))
    failed = [index for index, result in enumerate(results) if result.failed]
    assert failed == ([2] if num_failed == 1 else [0, 1, 2, 3])
    assert told in (results[2].failed or "")


def test_memory_limit_fails_the_sample_that_needs_more():
    with pool_of("hostile.allocate", num_workers=1, max_memory_mb=400) as pool:
        few, much, again = pool.score(ask("50", "4000", "60"))
        assert (few.score, again.score) == (50, 60) and len(pool.pids) == 1
    assert much.failed == "MemoryError: out of memory"


def test_kernel_takes_a_worker_when_memory_runs_out_and_the_sample_fails():
    with pool_of("hostile.oom_killed", num_workers=1) as pool:
        before, killed, after = pool.score(ask("a", "large", "b"))
    assert (before.score, after.score) == (1000, 1000), "the first in line for the kernel"
    assert "died (signal 9: killed from outside, by the kernel where memory ran out)" in (killed.failed or "")


def test_samples_may_come_while_others_are_scored():
    with pool_of("hostile.reward", num_workers=1) as pool:
        work, results = pool.new_round(), []
        thread = threading.Thread(target=lambda: results.extend(pool.run(work)))
        thread.start()
        for number, request in enumerate(ask(*(str(n) for n in range(20)))):
            work.submit(request)
            while number == 9 and len(work.results) < 10:  # until the pool has nothing more to do
                assert thread.is_alive()
                time.sleep(0.01)
        work.finish()
        thread.join(60)
        assert results == [RewardResult(float(n)) for n in range(20)]
        assert len(work.spans) == 20 and all(begin <= end for begin, end in work.spans)


def test_cancelled_round_ends_at_once_and_the_pool_serves_on():
    with pool_of("hostile.reward", num_workers=1) as pool:
        work = pool.new_round()
        work.submit(ask("1")[0])
        work.cancel()
        with pytest.raises(RoundCancelled):
            pool.run(work)
        assert pool.score(ask("5")) == [RewardResult(5.0)]


def test_all_workers_share_the_work():
    with pool_of("hostile.slow", num_workers=2) as pool:
        pool.check()
        assert len({r.score for r in pool.score(ask(*["x"] * 40))}) == 2


def test_workers_do_not_import_torch():
    assert "torch" in sys.modules or __import__("torch")
    with pool_of("hostile.reward") as pool:
        assert pool.score(ask("torch"))[0] == RewardResult(0.0)


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("large", "returned 1e+39, more than training's float32 holds"),
        ("text", "returned '1.0', not a number"),
        ("none", "returned None, not a number"),
        ("bad part", "returned nan"),
        ("bad answer", "returned the answer 42, not a text"),
        ("sys.exit", "SystemExit: 3"),
        ("not a float", "ValueError"),
        ("die", "died (exit code 3)"),
        ("segfault", "died (signal 11)"),
        ("hang", "timeout after 1 s"),
        ("hang in C", "timeout after 1 s"),
    ],
)
def test_hostile_reward_fails_its_own_sample_only(hostile, told):
    with pool_of("hostile.reward") as pool:
        results = pool.score(ask("1", "2", hostile, "3", "4", "5"))
        assert [r.score for r in results] == [1, 2, 0, 3, 4, 5]
        assert [r.failed is None for r in results] == [True, True, False, True, True, True]
        assert told in (results[2].failed or "")
        assert pool.score(ask("6")) == [RewardResult(6.0)]


def test_many_hostile_rewards_in_one_round_are_told_apart(caplog):
    bad = {7: "die", 8: "die", 20: "hang", 21: "raise", 63: "segfault"}
    with pool_of("hostile.reward") as pool:
        results = pool.score(ask(*(bad.get(n, str(n)) for n in range(64))))
    assert [i for i, r in enumerate(results) if r.failed] == list(bad)
    assert all(r.score == i for i, r in enumerate(results) if i not in bad)
    assert "rewards.x: 5 of 64 samples failed, first (row 7)" in caplog.text


def test_worker_killed_while_idle_costs_no_sample():
    with pool_of("hostile.reward") as pool:
        pool.check()
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(*pool.pids)
        assert pool.score(ask("1", "2", "3")) == [RewardResult(1.0), RewardResult(2.0), RewardResult(3.0)]


def test_worker_that_dies_while_it_starts_again_does_not_end_the_run(caplog):
    def ask_after(deaths):
        Path("deaths").write_text(str(deaths))
        return [result.score for result in pool.score(ask("die", "7", "8"))]

    with pool_of("hostile.DiesWhenTold", num_workers=1) as pool:
        assert ask_after(0) == [0, 7, 8]
        assert ask_after(2) == [0, 7, 8]
        assert "did not start: it died (signal 9: killed from outside" in caplog.text
        with pytest.raises(RewardError, match="did not start: it died"):
            ask_after(100)


def test_progress_counts_up_to_all():
    seen = []
    with pool_of("hostile.reward") as pool:
        pool.score(ask(*["1"] * 50), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (50, 50)


@pytest.mark.parametrize(
    ("target", "error", "told"),
    [
        ("hostile.absent", ConfigError, "rewards.x: .*has no 'absent'"),
        ("wants_more.f", MissingDependencyError, "pip install a_package_that_is_not_there"),
        ("hostile.Broken", RewardError, "rewards.x: .*did not start: OSError: no licence server"),
        ("hostile.Dies", RewardError, r"rewards.x: .*died \(exit code 7\)"),
        ("hostile.Sleeps", RewardError, "rewards.x: .*not ready after 2 s"),
    ],
)
def test_reward_that_cannot_be_built_is_an_error_of_check_and_of_score(target, error, told):
    with pool_of(target, start_timeout_s=2.0) as pool:
        with pytest.raises(error, match=told):
            pool.check()
        assert pool.pids == []
        with pytest.raises(error, match=told):
            pool.score(ask("1"))


def test_reward_is_found_where_the_parent_finds_it(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "only_here.py").write_text("def f(prompt, response, ground_truth): return 4")
    monkeypatch.syspath_prepend(folder)
    with pool_of("only_here.f") as pool:
        assert pool.score(ask("x"))[0].score == 4


def test_threads_may_score_at_the_same_time_and_end_before_the_workers():
    scores = {}
    with pool_of("hostile.reward") as pool:

        def work(number):
            scores[number] = [r.score for r in pool.score(ask(*[str(number)] * 40))]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert scores == {n: [n] * 40 for n in range(4)}
        before = set(pool.pids)
        time.sleep(0.7)  # longer than the workers take to see that a parent is gone
        assert {r.score for r in pool.score(ask(*["pid"] * 8))} <= before


def test_interrupted_score_leaves_no_stale_answers():
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pool_of("hostile.reward") as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score(ask(*["1"] * 200), interrupt)
        assert pool.score(ask("5", "6")) == [RewardResult(5.0), RewardResult(6.0)]


def test_ctrl_c_does_not_reach_the_workers():
    with pool_of("hostile.reward") as pool:
        pool.check()
        assert all(os.getpgid(pid) == pid != os.getpgid(0) for pid in pool.pids)
        for pid in pool.pids:
            os.kill(pid, signal.SIGINT)
        before = set(pool.pids)
        assert {r.score for r in pool.score(ask("pid", "pid"))} <= before


def test_close_ends_workers_and_the_pool():
    pool = pool_of("hostile.reward")
    pool.check()
    pids = pool.pids
    assert len(pids) == 2 and all(map(alive, pids))
    pool.close()
    pool.close()
    wait_until_gone(*pids)
    with pytest.raises(RewardError, match="closed"):
        pool.score(ask("1"))


def test_timeout_also_ends_what_the_reward_started(tmp_path):
    noted = tmp_path / "child.pid"
    with pool_of("hostile.reward") as pool:
        assert pool.score(ask("spawn and hang", truth=str(noted)))[0].failed
    wait_until_gone(int(noted.read_text()))


PARENT = """
import os, signal, sys, threading, time
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
pool = RewardPool(reward_spec("hostile.reward", {}, "rewards.x"), 2, 2.0, "rewards.x")
pool.check()
if sys.argv[1] == "fork":  # something that inherited our descriptors outlives us
    if os.fork() == 0:
        os.write(1, b"fork\\n")  # in one piece: two processes write
        time.sleep(30)
        os._exit(0)
os.write(1, f"ready {' '.join(map(str, pool.pids))}\\n".encode())
busy = [RewardRequest("p", sys.argv[2], sys.argv[3])] if sys.argv[2] else []
if sys.argv[1] == "exit":
    sys.exit()
pool.score(busy)
time.sleep(600)
"""


def start_parent(*arguments: str) -> tuple[subprocess.Popen, list[int]]:
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    line = ""
    while not line.startswith("ready"):
        line = parent.stdout.readline()
        assert line, "the parent ended before its pool was ready"
    return parent, [int(word) for word in line.split()[1:]]


def test_workers_end_when_the_parent_exits_without_closing():
    parent, pids = start_parent("exit", "", "")
    assert parent.wait(30) == 0
    wait_until_gone(*pids)


@pytest.mark.parametrize(
    ("mode", "response"), [("stay", ""), ("stay", "hang"), ("stay", "hang in C"), ("fork", ""), ("fork", "hang")]
)
def test_workers_end_when_the_parent_is_killed(mode, response):
    parent, pids = start_parent(mode, response, "")
    time.sleep(0.2)  # the busy worker is at its sample
    parent.kill()
    parent.wait(30)
    wait_until_gone(*pids)


def test_what_a_reward_started_ends_when_the_parent_is_killed(tmp_path):
    noted = tmp_path / "child.pid"
    parent, pids = start_parent("stay", "spawn and hang", str(noted))
    deadline = time.monotonic() + 30
    while not (noted.exists() and noted.read_text()):
        assert time.monotonic() < deadline, "the reward did not start its child within 30 s"
        time.sleep(0.02)
    parent.kill()
    parent.wait(30)
    wait_until_gone(*pids, int(noted.read_text()))


def test_worker_that_someone_kills_costs_no_sample():
    """The sample that it was at is scored by the next one."""
    killed: list[int] = []
    with pool_of("hostile.slow") as pool:
        pool.check()

        def kill_once(done: int, _: int) -> None:
            if done and not killed:
                killed.extend(pool.pids)
                os.kill(killed[0], signal.SIGKILL)

        results = pool.score(ask(*["x"] * 100), kill_once)
        assert killed and not [result for result in results if result.failed]
        assert killed[0] not in pool.pids
