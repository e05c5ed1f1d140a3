"""Attention over packed samples: every kernel computes the same, and no layer reads lengths from the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import Checkpoints, model_setup, sequences
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from roll_gspo.strategies.megatron.config import MegatronConfig

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
pytestmark = pytest.mark.megatron

LENGTHS = (5, 1, 12, 4, 7, 12)
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def by_span(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, **how: Any) -> Tensor:
    """Return what flash attention returns: one span at a time, causal from the last key backwards."""
    outs = []
    pieces = zip(
        *(t.tensor_split(s[1:-1].tolist()) for t, s in ((query, starts), (key, key_starts), (value, key_starts))),
        strict=True,
    )
    for q, k, v in pieces:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        seen = causal_lower_right(q.shape[2], k.shape[2])
        outs.append(F.scaled_dot_product_attention(q, k, v, seen, **how)[0].transpose(0, 1))
    return torch.cat(outs)


def torch_2_10(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False):
    assert is_causal and max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    return by_span(q, k, v, cu_seq_q, cu_seq_k)


def torch_2_11(
    q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    return by_span(q, k, v, cu_seq_q, cu_seq_k, scale=scale)


def torch_2_13(
    q: Any, k: Any, v: Any, starts: Any, key_starts: Any, max_q: int, max_k: int, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa
    return by_span(q, k, v, starts, key_starts, scale=scale, enable_gqa=enable_gqa)


VERSIONS: dict[str, Callable[..., Any]] = {"2.10": torch_2_10, "2.11": torch_2_11, "2.13": torch_2_13}


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, KEY_HEADS, KEY_HEADS)
    return tuple(  # type: ignore[return-value]
        torch.randn(sum(LENGTHS), heads, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in sizes
    )


def one_at_a_time(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    outs = []
    for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def check_equal(attend: Callable[..., Tensor], want: Callable[..., Tensor]) -> None:
    """Compare outputs, and gradients of a loss that weighs every output differently."""
    found = []
    for compute in (attend, want):
        inputs = tokens()
        out = compute(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_hides_earlier_positions(window: int) -> None:
    from roll_gspo.strategies.varlen import adapted, packed_attention

    def in_window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outs = []
        for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
            distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
            seen = (distance >= 0) & (distance < window)
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            outs.append(F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    check_equal(lambda q, k, v: packed_attention(q, k, v, LENGTHS, None, None, window), in_window)
    asked: list[object] = []

    def torch_with_windows(*args: Any, window_size: Any = None, scale: Any = None, enable_gqa: bool = False) -> Tensor:
        asked.append(window_size)
        return args[0]

    packed_attention(*tokens(), LENGTHS, None, adapted(torch_with_windows), window)
    assert asked == [(window - 1, 0)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_packed_attention_is_that_of_single_samples(version: str | None, scale: float | None) -> None:
    from roll_gspo.strategies.varlen import adapted, packed_attention

    kernel = None if version is None else adapted(VERSIONS[version])
    check_equal(
        lambda q, k, v: packed_attention(q, k, v, LENGTHS, scale, kernel),
        lambda q, k, v: one_at_a_time(q, k, v, scale),
    )


def test_installed_torch_takes_the_keywords_of_the_newest_version() -> None:
    known = inspect.signature(varlen_attn).parameters
    assert {"window_size", "scale", "enable_gqa"} <= known.keys() and list(known)[5:7] == ["max_q", "max_k"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("version", "window"), [(None, 4), *((version, None) for version in (None, *VERSIONS))])
def test_context_ranks_compute_their_part_of_whole_samples(version: str | None, window: int | None, ranks: int) -> None:
    from roll_gspo.strategies.megatron.engine.packed_layout import own_positions
    from roll_gspo.strategies.varlen import adapted, context_attention

    kernel = None if version is None else adapted(VERSIONS[version])
    lengths = tuple(2 * ranks * size for size in (1, 3, 2))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, SIZE, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    pieces = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    wholes = []
    for piece in pieces:
        distance = torch.arange(len(piece[0]))[:, None] - torch.arange(len(piece[0]))
        seen = (distance >= 0) & (distance < (window or len(distance)))
        heads = (tensor.transpose(0, 1) for tensor in piece)
        wholes.append(F.scaled_dot_product_attention(*heads, seen, enable_gqa=True))
    whole = torch.cat(wholes, 1).transpose(0, 1)
    places = [
        torch.cat([start + own_positions(length, rank, ranks) for start, length in zip(starts, lengths, strict=True)])
        for rank in range(ranks)
    ]
    gathered = key[torch.cat(places)], value[torch.cat(places)]
    own = tuple(length // ranks for length in lengths)
    for rank, place in enumerate(places):
        out = context_attention(query[place], *gathered, own, (rank, ranks), None, kernel, window)
        torch.testing.assert_close(out, whole[place], rtol=0, atol=1e-6)


class HostReads(TorchDispatchMode):
    """Record operations that read a value from the device, or whose result has a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or any(
            index is not None and index.dtype == torch.bool for index in indices
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "packed"), [("qwen3_tied", False), ("qwen3_tied", True), ("gemma3", True)])
def test_layers_wait_for_no_value_of_the_device(checkpoint: Checkpoints, family: str, packed: bool) -> None:
    engine = megatron.MegatronInfer(model_setup(checkpoint(family)), MegatronConfig(use_sequence_packing=packed))
    model = engine._model
    model.chunks[0].requires_grad_(True)
    micro_batch = model.micro_batch(sequences(), None)
    with HostReads() as reads:
        model._forward(micro_batch, model.chunks[0]).sum().backward()
    assert reads.found == []
    with HostReads() as reads:
        assert bool(torch.ones(3)[torch.tensor([True, False, True])].sum() > 1)
    assert reads.found == ["index", "_local_scalar_dense"]
