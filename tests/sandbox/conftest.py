"""Shared sandboxes; tests are skipped on hosts without isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from roll_gspo.sandbox import Limits, Outcome, Sandbox, SandboxError

Run = Callable[..., Outcome]
SECRET = "planted-secret-7c1f"


def make_sandbox(limits: Limits, **arguments: object) -> Sandbox:
    """Return a sandbox, or skip the test."""
    try:
        return Sandbox(limits, **arguments)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """Return a sandbox with long time limits, so that programs do not time out on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOX_TEST_TOKEN", SECRET)
        with make_sandbox(Limits(wall_s=60, cpu_s=20, memory_mb=256, file_mb=4, tmp_mb=8, output_kb=64)) as sandbox:
            yield sandbox


@pytest.fixture(scope="session")
def multiprocess_sandbox() -> Iterator[Sandbox]:
    """Return a sandbox whose programs may start processes."""
    with make_sandbox(Limits(wall_s=60, cpu_s=20, memory_mb=128, processes=6, threads=6, output_kb=64)) as sandbox:
        yield sandbox


@pytest.fixture
def run(sandbox: Sandbox) -> Run:
    """Return a function that runs a program once."""

    def run(source: str, stdin: str = "", wall_s: float | None = None) -> Outcome:
        with sandbox.start(source) as program:
            assert not program.problem
            return program.run(stdin, wall_s)

    return run
