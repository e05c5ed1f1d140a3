"""The pool of worker processes: hostile rewards, order of results, and cleanup of processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roll_gspo.errors import ConfigError, MissingDependencyError, RewardError
from roll_gspo.rewards import RewardPool, RewardRequest, RewardResult, reward_spec
from roll_gspo.workers.output import WorkerOutput

HOSTILE = """
import os, re, subprocess, sys, time
from roll_gspo.rewards import RewardOutput
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
    if response == "prints much": print("x" * 3_000_000, flush=True); return 1.0
    if response == "half a message": os.write(int(sys.argv[1]), bytes(7) + bytes([200]) + b"half"); return 1.0
    if response == "dribbles":
        os.write(int(sys.argv[1]), bytes(6) + bytes([1, 0]))
        while True: os.write(int(sys.argv[1]), b"x"); time.sleep(0.1)
    if response == "no result": os.write(int(sys.argv[1]), bytes(7) + bytes([2]) + b"[]"); time.sleep(600)
    if response == "two results": os.write(int(sys.argv[1]), 2 * (bytes(7) + bytes([14]) + b'{"score": 1.0}'))
    if response == "daemon":
        code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code, ground_truth], start_new_session=True)
        while not os.path.exists(ground_truth) or not open(ground_truth).read(): time.sleep(0.01)
        return 1.0
    if response == "torch": return "torch" in sys.modules
    if response == "pid": return os.getpid()
    if response == "output": return RewardOutput(0.75, "42", {"right": 1, "form": 0.5})
    if response == "bad component": return RewardOutput(0.75, "42", {"right": float("nan")})
    if response == "bad answer": return RewardOutput(0.75, 42)
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
class DiesOnRequest:
    def __init__(self):
        deaths = int(open("deaths").read())
        open("deaths", "w").write(str(max(0, deaths - 1)))
        if deaths: os.kill(os.getpid(), 9)
    def __call__(self, prompt, response, ground_truth): return reward(prompt, response, ground_truth)
class Sleeps:
    def __init__(self): time.sleep(600)
"""
TIMEOUT_S = 1.0


@pytest.fixture(autouse=True)
def hostile_module(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    (tmp_path / "missing_import.py").write_text("import a_package_that_is_not_there\ndef f(p, r, g): return 0")
    monkeypatch.chdir(tmp_path)  # workers have the working directory in sys.path


def make_pool(target: str, num_workers: int = 2, **settings) -> RewardPool:
    return RewardPool(reward_spec(target, {}, "rewards.x"), num_workers, TIMEOUT_S, "rewards.x", **settings)


def make_requests(*responses: str, truth: str = "") -> list[RewardRequest]:
    return [RewardRequest("p", response, truth, {"id": str(i)}) for i, response in enumerate(responses)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"{[p for p in pids if alive(p)]} are still running after {within_s} s"
        time.sleep(0.02)


def test_scores_are_in_order_and_processes_are_reused():
    with make_pool("hostile.reward") as pool:
        for start in (0, 1000):
            results = pool.score(make_requests(*(str(n) for n in range(start, start + 300))))
            assert results == [RewardResult(float(n)) for n in range(start, start + 300)]
        first = set(pool.pids)
        assert {r.score for r in pool.score(make_requests(*["pid"] * 64))} <= first
        assert pool.score([]) == []


def test_reward_output_becomes_result():
    with make_pool("hostile.reward") as pool:
        results = pool.score(make_requests("output", "1"))
        assert results == [RewardResult(0.75, None, "42", {"right": 1.0, "form": 0.5}), RewardResult(1.0)]


def test_batch_reward_gets_at_most_max_batch_samples():
    with make_pool("hostile.Batch", num_workers=1, max_batch=4) as pool:
        assert [r.score for r in pool.score(make_requests(*["1"] * 10))] == [4] * 8 + [2] * 2


@pytest.mark.parametrize(
    ("hostile", "reason", "num_failed"),
    [
        ("raise", "KeyError: 'no such thing'", 1),
        ("nan", "returned nan", 1),
        ("text", "returned '1'", 1),
        ("die", "exit code 3", 1),
        ("hang", "timeout after 1 s", 1),
        ("short", "1 scores for 4 requests", 4),
        ("not a list", "TypeError", 1),
    ],
)
def test_failed_batch_is_retried_one_by_one(hostile, reason, num_failed):
    with make_pool("hostile.Batch", num_workers=1, max_batch=4) as pool:
        results = pool.score(make_requests("1", "2", hostile, "3", "4", "5"))
    failed = [index for index, result in enumerate(results) if result.failed]
    assert failed == ([2] if num_failed == 1 else [0, 1, 2, 3])
    assert reason in (results[2].failed or "")


def test_memory_limit_fails_only_the_sample_that_exceeds_it():
    with make_pool("hostile.allocate", num_workers=1, max_memory_mb=400) as pool:
        before, large, after = pool.score(make_requests("50", "4000", "60"))
        assert (before.score, after.score) == (50, 60) and len(pool.pids) == 1
    assert (large.failed or "").startswith("MemoryError")


def test_oom_killed_worker_fails_its_sample():
    with make_pool("hostile.oom_killed", num_workers=1) as pool:
        before, killed, after = pool.score(make_requests("a", "large", "b"))
    assert (before.score, after.score) == (1000, 1000), "oom_score_adj of the workers"
    assert "signal 9" in (killed.failed or "")


def test_requests_are_spread_over_all_workers():
    with make_pool("hostile.slow", num_workers=2) as pool:
        pool.check()
        assert len({r.score for r in pool.score(make_requests(*["x"] * 40))}) == 2


def test_workers_do_not_import_torch():
    assert "torch" in sys.modules or __import__("torch")
    with make_pool("hostile.reward") as pool:
        assert pool.score(make_requests("torch"))[0] == RewardResult(0.0)


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("large", "returned 1e+39"),
        ("text", "returned '1.0'"),
        ("none", "returned None"),
        ("bad component", "returned nan"),
        ("bad answer", "answer 42"),
        ("sys.exit", "SystemExit: 3"),
        ("not a float", "ValueError"),
        ("die", "exit code 3"),
        ("segfault", "signal 11"),
        ("hang", "timeout after 1 s"),
        ("hang in C", "timeout after 1 s"),
    ],
)
def test_hostile_reward_fails_only_its_sample(hostile, reason):
    with make_pool("hostile.reward") as pool:
        results = pool.score(make_requests("1", "2", hostile, "3", "4", "5"))
        assert [r.score for r in results] == [1, 2, 0, 3, 4, 5]
        assert [r.failed is None for r in results] == [True, True, False, True, True, True]
        assert reason in (results[2].failed or "")
        assert pool.score(make_requests("6")) == [RewardResult(6.0)]


def test_each_hostile_sample_of_a_job_fails_alone(caplog):
    bad = {7: "die", 8: "die", 20: "hang", 21: "raise", 63: "segfault"}
    with make_pool("hostile.reward") as pool:
        results = pool.score(make_requests(*(bad.get(n, str(n)) for n in range(64))))
    assert [i for i, r in enumerate(results) if r.failed] == list(bad)
    assert all(r.score == i for i, r in enumerate(results) if i not in bad)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("rewards.x: 5 of 64 ") and "(row 7)" in warning


def test_worker_killed_while_idle_fails_no_sample():
    with make_pool("hostile.reward") as pool:
        pool.check()
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(*pool.pids)
        assert pool.score(make_requests("1", "2", "3")) == [RewardResult(1.0), RewardResult(2.0), RewardResult(3.0)]


def test_worker_that_dies_during_a_restart_is_replaced(caplog):
    def scores_after(deaths):
        Path("deaths").write_text(str(deaths))
        return [result.score for result in pool.score(make_requests("die", "7", "8"))]

    with make_pool("hostile.DiesOnRequest", num_workers=1) as pool:
        assert scores_after(0) == [0, 7, 8]
        assert scores_after(2) == [0, 7, 8]
        assert "rewards.x" in caplog.text and "signal 9" in caplog.text
        with pytest.raises(RewardError, match=r"rewards\.x.*signal 9"):
            scores_after(100)


def test_progress_counts_up_to_the_number_of_samples():
    seen = []
    with make_pool("hostile.reward") as pool:
        pool.score(make_requests(*["1"] * 50), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (50, 50)


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        ("hostile.absent", ConfigError, r"^rewards\.x: .*'absent'"),
        ("missing_import.f", MissingDependencyError, "pip install a_package_that_is_not_there"),
        ("hostile.Broken", RewardError, r"^rewards\.x: .*OSError: no licence server"),
        ("hostile.Dies", RewardError, r"^rewards\.x: .*exit code 7"),
        ("hostile.Sleeps", RewardError, r"^rewards\.x: .*start_timeout_s 2"),
    ],
)
def test_reward_that_cannot_be_built_fails_check_and_score(target, error, match):
    with make_pool(target, start_timeout_s=2.0) as pool:
        with pytest.raises(error, match=match):
            pool.check()
        assert pool.pids == []
        with pytest.raises(error, match=match):
            pool.score(make_requests("1"))


def test_worker_has_the_sys_path_of_the_parent(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "only_here.py").write_text("def f(prompt, response, ground_truth): return 4")
    monkeypatch.syspath_prepend(folder)
    with make_pool("only_here.f") as pool:
        assert pool.score(make_requests("x"))[0].score == 4


def test_threads_can_score_concurrently_and_end_before_the_workers():
    scores = {}
    with make_pool("hostile.reward") as pool:

        def score(number):
            scores[number] = [r.score for r in pool.score(make_requests(*[str(number)] * 40))]

        threads = [threading.Thread(target=score, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert scores == {n: [n] * 40 for n in range(4)}
        before = set(pool.pids)
        time.sleep(0.7)  # longer than the interval at which workers check their parent
        assert {r.score for r in pool.score(make_requests(*["pid"] * 8))} <= before


def test_interrupted_score_leaves_no_stale_results():
    def interrupt(done, total):
        raise KeyboardInterrupt

    with make_pool("hostile.reward") as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score(make_requests(*["1"] * 50, "hang"), interrupt)
        assert pool.score(make_requests("5", "6")) == [RewardResult(5.0), RewardResult(6.0)]


def test_ctrl_c_does_not_reach_the_workers():
    with make_pool("hostile.reward") as pool:
        pool.check()
        assert all(os.getpgid(pid) == pid != os.getpgid(0) for pid in pool.pids)
        for pid in pool.pids:
            os.kill(pid, signal.SIGINT)
        before = set(pool.pids)
        assert {r.score for r in pool.score(make_requests("pid", "pid"))} <= before


def test_close_kills_workers_and_closed_pool_raises():
    pool = make_pool("hostile.reward")
    pool.check()
    pids = pool.pids
    assert len(pids) == 2 and all(map(alive, pids))
    pool.close()
    pool.close()
    wait_until_gone(*pids)
    with pytest.raises(RewardError, match=r"^rewards\.x: .*closed"):
        pool.score(make_requests("1"))


def test_timeout_also_kills_child_processes_of_the_reward(tmp_path):
    pid_file = tmp_path / "child.pid"
    with make_pool("hostile.reward") as pool:
        assert pool.score(make_requests("spawn and hang", truth=str(pid_file)))[0].failed
    wait_until_gone(int(pid_file.read_text()))


PARENT = """
import os, signal, sys, threading, time
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
pool = RewardPool(reward_spec("hostile.reward", {}, "rewards.x"), 2, 2.0, "rewards.x")
pool.check()
if sys.argv[1] == "fork":  # a process that inherited the descriptors outlives this one
    if os.fork() == 0:
        os.write(1, b"fork\\n")  # one atomic write, because two processes write
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
        assert line, "the parent exited before its pool was ready"
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
    time.sleep(0.2)  # until the busy worker has started its sample
    parent.kill()
    parent.wait(30)
    wait_until_gone(*pids)


def test_child_processes_of_the_reward_end_when_the_parent_is_killed(tmp_path):
    pid_file = tmp_path / "child.pid"
    parent, pids = start_parent("stay", "spawn and hang", str(pid_file))
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline, "the reward did not start its child within 30 s"
        time.sleep(0.02)
    parent.kill()
    parent.wait(30)
    wait_until_gone(*pids, int(pid_file.read_text()))


def test_current_sample_of_a_killed_worker_is_retried():
    killed: list[int] = []
    with make_pool("hostile.slow") as pool:
        pool.check()

        def kill_once(done: int, _: int) -> None:
            if done and not killed:
                killed.extend(pool.pids)
                os.kill(killed[0], signal.SIGKILL)

        results = pool.score(make_requests(*["x"] * 100), kill_once)
        assert killed and not [result for result in results if result.failed]
        assert killed[0] not in pool.pids


def test_output_of_a_worker_is_limited(capfd):
    with make_pool("hostile.reward", num_workers=1) as pool:
        assert [r.score for r in pool.score(make_requests("prints much", "1"))] == [1.0, 1.0]
    captured = capfd.readouterr().err
    assert 16 * 1024 <= len(captured) < 20 * 1024
    (line,) = [line for line in captured.splitlines() if line.startswith("rewards.x: ")]
    assert re.search(r"rewards\.x: 2,98\d,\d{3} bytes of output of worker \d+ were dropped", line)


def test_output_of_all_workers_is_limited_per_step(capfd):
    reader, writer = os.pipe()
    output = WorkerOutput("rewards.x", writer, max_worker_bytes=60, max_step_bytes=100)
    pipes = [os.pipe() for _ in range(3)]
    for pid, (source, _) in enumerate(pipes):
        output.add(source, pid)
    for _, target in pipes:
        os.write(target, b"a" * 50)
    for source, target in pipes:
        os.close(target)
        output.remove(source)
    output.close()
    os.close(writer)
    text = os.read(reader, 10_000).decode()
    os.close(reader)
    assert text.count("a" * 50) == 2 and text.count("50 bytes of output of worker") == 1


@pytest.mark.parametrize(
    ("response", "reason"),
    [("half a message", "died|timeout"), ("dribbles", "timeout"), ("no result", "died")],
)
def test_broken_messages_of_a_worker_fail_its_sample_only(response, reason):
    with make_pool("hostile.reward", num_workers=2) as pool:
        started = time.monotonic()
        first, *others = pool.score(make_requests(response, *map(str, range(20))))
        assert re.search(reason, first.failed or "")
        assert [r.score for r in others] == list(map(float, range(20)))
        assert time.monotonic() - started < 15


def test_worker_that_sends_too_many_results_is_replaced():
    with make_pool("hostile.reward", num_workers=1) as pool:
        assert pool.score(make_requests("two results")) == [RewardResult(1.0)]
        assert pool.score(make_requests("5", "6")) == [RewardResult(5.0), RewardResult(6.0)]


def test_daemon_of_a_reward_ends_with_the_pool(tmp_path):
    with make_pool("hostile.reward", num_workers=1) as pool:
        assert pool.score(make_requests("daemon", truth=str(tmp_path / "pid")))[0].score == 1
        daemon = int((tmp_path / "pid").read_text())
        assert alive(daemon)
    wait_until_gone(daemon)


def test_failure_has_the_place_in_the_reward():
    with make_pool("hostile.reward", num_workers=1) as pool:
        (result,) = pool.score(make_requests("raise"))
    assert result.failed == "KeyError: 'no such thing'"
    assert 'hostile.py", line 5, in reward' in result.traceback and "roll_gspo" not in result.traceback
