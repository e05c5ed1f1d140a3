"""Checks of the machine, their time limits, and the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from composed import load_config

import roll_gspo.doctor.__main__ as command
from roll_gspo.doctor import machine, versions
from roll_gspo.doctor.communication import communication_findings, run_processes
from roll_gspo.doctor.findings import Check, Finding, Findings, Status, ok, run_checks, summary, text_of
from roll_gspo.errors import ConfigError
from roll_gspo.run import shipped_folders

ROOT = Path(__file__).parents[2]
GPU_EXAMPLES = sorted(file.stem for file in shipped_folders()[0].glob("qwen*.yaml"))


def statuses(findings: Findings) -> list[Status]:
    return [finding.status for finding in findings]


def test_every_check_ends() -> None:
    def fails() -> Findings:
        raise ConfigError("one: is wrong\ntwo: is wrong")

    def breaks() -> Findings:
        yield ok("first")
        raise ZeroDivisionError("unexpected")

    checks = [
        Check("hangs", lambda: time.sleep(60) or [], timeout_s=0.1),
        Check("fails", fails),
        Check("breaks", breaks),
        Check("elsewhere", fails, needs="a moon"),
    ]
    found = list(run_checks(checks, offline=True))
    assert [(f.topic, f.status) for f in found] == [
        ("hangs", Status.ERROR),
        *[("fails", Status.ERROR)] * 2,
        ("breaks", Status.OK),
        ("breaks", Status.ERROR),
        ("elsewhere", Status.NOT_CHECKED),
    ]
    assert "within 0.1 s" in found[0].text and "ZeroDivisionError: unexpected" in found[4].text
    assert found[5].text == "needs a moon" and summary(found) == "4 errors, 1 not checked"
    assert text_of(Finding(Status.OK, "text", "topic")).split() == ["ok", "topic", "text"]


@pytest.mark.parametrize("example", GPU_EXAMPLES)
def test_gpu_examples_pass_offline(example: str) -> None:
    config = load_config(example).config
    found = list(run_checks(command.checks_of(config, (), offline=True), offline=True))
    assert not [finding.text for finding in found if finding.status == Status.ERROR]
    unchecked = {finding.topic for finding in found if finding.status == Status.NOT_CHECKED}
    assert {"GPUs", "network", "engines", "communication"} <= unchecked


def test_command_on_the_example(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    arguments = ("--config-name", "example_gspo", "strategy=hf", "rewards.column_addition.timeout_s=9")
    done = subprocess.run(
        [sys.executable, "-m", "roll_gspo.doctor", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not done.returncode, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "can this machine run example_gspo?" in lines[0] and lines[-1] in ("no problems", "1 warning")
    assert len(lines) < 30 and "hf_infer, hf_train: imported in" in done.stdout
    assert not list(tmp_path.iterdir())


def test_files_may_be_on_the_machine_of_the_run() -> None:
    config = load_config("example_gspo", "pretrain=/no/such", "warm_start=null").config
    for offline, status in ((True, Status.NOT_CHECKED), (False, Status.ERROR)):
        (found,) = (f for f in command._preflight_findings(config, offline) if f.topic == "models")
        assert found.status == status and "pretrain: no folder '/no/such'" in found.text


def test_errors_give_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_config("example_gspo", "execution=local", "actor_infer.device_mapping=[0,1]")
    monkeypatch.setattr(command, "set_environment", lambda environment: None)
    assert command.examine(loaded, offline=True) == 1
    printed = capsys.readouterr().out
    assert "error       plan           actor_infer.device_mapping: 2 devices" in printed


def test_versions_that_do_not_fit_are_named() -> None:
    requirements = {
        "roll-gspo": ["torch<2.14,>=2.11", 'ray<2.62,>=2.60; extra == "ray"'],
        "vllm": ["torch==2.13.0", 'torch==9; platform_machine == "none"', "transformers>=5", 'ray==1; extra == "x"'],
    }
    installed = {"torch": "2.11.0+cu130", "vllm": "0.32.0", "transformers": "5.17.0", "ray": "2.59.0"}
    texts = [f.text for f in versions.conflicts(installed, lambda package: requirements.get(package, []))]
    assert texts == [
        "roll-gspo needs ray<2.62,>=2.60, but 2.59.0 is installed; run pip install 'ray<2.62,>=2.60'",
        "vllm 0.32.0 needs torch==2.13.0, but 2.11.0+cu130 is installed; run pip install 'torch==2.13.0'",
    ]
    fitting = {**installed, "torch": "2.13.0+cu130", "ray": "2.60.0"}
    assert not list(versions.conflicts(fitting, lambda package: requirements.get(package, [])))


@pytest.mark.parametrize(
    ("line", "found"), [("cuda: Optional[str] = None", None), ("cuda: Optional[str] = '13.0'", (13, 0)), ("", None)]
)
def test_build_of_torch_is_read_from_its_files(
    line: str, found: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: spec)
    assert versions.cuda_of_torch() == found


def test_network_and_cluster() -> None:
    config = load_config("example_gspo", "execution=ray").config
    assert statuses(machine.network_findings({})) == [Status.OK]
    (problem, _) = machine.network_findings({"NCCL_SOCKET_IFNAME": "nosuch0"})
    assert problem.status == Status.ERROR and problem.text.startswith("NCCL_SOCKET_IFNAME: no interface 'nosuch0'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert statuses(machine.cluster_findings(config, {"RAY_ADDRESS": address})) == [Status.OK]
    for wrong in (address, "somewhere"):
        assert statuses(machine.cluster_findings(config, {"RAY_ADDRESS": wrong})) == [Status.ERROR]
    assert statuses(machine.cluster_findings(config, {})) == [Status.OK]


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local, ray = (load_config("example_gspo", f"execution={name}").config for name in ("local", "ray"))
    for free, status in ((64 << 20, Status.ERROR), (1 << 30, Status.WARNING), (8 << 30, Status.OK)):
        usage = machine.shutil._ntuple_diskusage(16 << 30, (16 << 30) - free, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert statuses(machine.shared_memory_findings(ray, tmp_path)) == [status]
        assert statuses(machine.shared_memory_findings(local, tmp_path)) == [Status.OK]


def test_sandbox_runs_a_program_if_a_reward_does() -> None:
    (unused,) = machine.sandbox_findings(load_config("example_gspo").config)
    assert "not used" in unused.text
    (used,) = machine.sandbox_findings(load_config("example_multi_domain").config)
    assert used.status == Status.OK and "rewards." in used.text


def test_two_processes_communicate() -> None:
    (finding,) = communication_findings(num_gpus=0)
    assert finding.status == Status.OK and "gloo between 2 processes: sums are right" in finding.text


@pytest.mark.long
def test_process_that_fails_or_hangs_is_named() -> None:
    reasons = run_processes(2, environment={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert reasons.keys() == {0, 1} and all("nosuch0" in reason for reason in reasons.values())
    assert run_processes(2, timeout_s=0.2) == dict.fromkeys((0, 1), "not done within 0.2 s")
