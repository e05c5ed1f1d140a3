"""The Triton kernels of the scores: their values in Triton's interpreter, and their machine code for Hopper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vocabulary_parallel import Solution, reference

TESTS = Path(__file__).parents[1]

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; it has wheels for Linux only", allow_module_level=True)

from triton_interpreter import CASES  # noqa: E402 - imports triton


@pytest.fixture(scope="module")
def solutions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Solution]]:
    """Solutions of all cases by rank, of two processes with Triton's interpreter."""
    folder = tmp_path_factory.mktemp("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(TESTS / "triton_interpreter.py")]
    children = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank, child in enumerate(children):
        _, errors = child.communicate(timeout=240)
        assert child.returncode == 0, f"rank {rank}: {errors}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _whole(name: str, solutions: list[dict[str, Solution]]) -> Solution:
    """Return the solution of a case; of a split head, after both ranks have reported the same scores."""
    parts = [by_name[name] for by_name in solutions if by_name[name] is not None]
    assert len(parts) == 1 + CASES[name].split
    for other in parts[1:]:
        assert torch.equal(parts[0].log_probs, other.log_probs) and torch.equal(parts[0].entropies, other.entropies)
    return Solution(
        *parts[0][:2],
        torch.stack([part.d_hidden for part in parts]).sum(0),
        torch.cat([part.d_weight for part in parts]),
    )


@pytest.mark.parametrize("name", CASES)
def test_triton_scores_and_gradients_equal_those_of_torch(name: str, solutions: list[dict[str, Solution]]) -> None:
    case = CASES[name]
    got, want = _whole(name, solutions), case.solve(case.head, "torch")
    exact = case.dtype == torch.float32
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if number < 2 or exact:
            tolerance = 3e-5 if case.fp32_lm_head is not False else 0.1  # one step of a rounded logit is 0.06
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        elif theirs.numel():
            assert (ours - theirs).double().norm() <= 2 * torch.finfo(case.dtype).eps * theirs.double().norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_scores_and_gradients_equal_a_float64_reference(
    dtype: str, solutions: list[dict[str, Solution]]
) -> None:
    name = f"{dtype} temperature and padding"
    got, want = _whole(name, solutions), reference(CASES[name].head, 0.6)
    for ours, exact in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)
    step = torch.finfo(CASES[name].dtype).eps
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert (ours - exact).norm() < max(step, 1e-5) * exact.norm()
    assert torch.count_nonzero(got.d_weight[61:]) == 0


def test_triton_gives_a_token_outside_of_the_vocabulary_no_probability(solutions: list[dict[str, Solution]]) -> None:
    log_probs = _whole("float32 tokens outside the vocabulary", solutions).log_probs
    assert (~log_probs.isfinite()).nonzero()[:, 0].tolist() == [2, 3]


def test_triton_refuses_float64() -> None:
    from roll_gspo.strategies.fused_scores_triton import tiles_for

    with pytest.raises(ValueError, match=r"not in torch\.float64; use torch"):
        tiles_for(torch.float64, torch.device("cpu"))


def _compiled(kernel: Any, tiles: Any, pointers: dict[str, str], **constants: Any) -> str:
    """Return the PTX of a kernel for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants |= {"ROUNDED": False, "EVEN": True, "GROUP": 16}
    constants |= {"BM": tiles.tokens, "BN": tiles.rows, "BK": tiles.hidden}
    types = pointers | dict.fromkeys(("num_tokens", "num_rows", "hidden_size"), "i32") | {"temperature_inverse": "fp32"}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in pointers or name == "hidden_size"
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    compiled: Any = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 227 * 1024
    return compiled.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_triton_kernels_compile_for_hopper_and_use_its_tensor_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device is needed: Triton brings its assembler."""
    from roll_gspo.strategies import fused_scores_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    inputs = {"hidden": "*bf16", "weight": "*bf16", "tokens": "*i64"}
    numbers = dict.fromkeys(("log_total", "of_log_prob", "entropies", "of_entropy"), "*fp32")
    sums = _compiled(
        kernels.sums_kernel, kernels.LARGE, inputs | {"sums": "*fp32"}, ENTROPY=True, PART=8 * kernels.LARGE.rows
    )
    gradients = _compiled(
        kernels.gradients_kernel, kernels.LARGE, inputs | numbers | {"gradients": "*bf16"}, ENTROPY=True
    )
    assert "wgmma.mma_async" in sums and "wgmma.mma_async" in gradients
