"""Do the functions of the flash-attn package give what that package's documentation says?"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from inlay.compat import flash_attn
from inlay.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from tests.support.compare import assert_same_bits

OPTIONS = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
           "return_attn_probs"]  # fmt: skip
POSITIONS = {
    "flash_attn_func": ["q", "k", "v", *OPTIONS],
    "flash_attn_kvpacked_func": ["q", "kv", *OPTIONS],
    "flash_attn_qkvpacked_func": ["qkv", *OPTIONS],
    "flash_attn_varlen_func": [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *OPTIONS, "block_table",
    ],
}  # fmt: skip


def expected(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None) -> tuple[Tensor, Tensor]:
    """The documented behaviour, written anew: o and the logarithms, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    at = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(k.shape[2], device=q.device)
    if slopes is not None:
        scores = scores - slopes.double().reshape(-1, q.shape[1], 1, 1) * (at - key).abs()
    left, right = window
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden |= key < at - left
    if right >= 0 or causal:
        hidden |= key > at + (0 if causal else right)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return (torch.softmax(scores, -1).nan_to_num() @ v).transpose(1, 2), lse


def tensors(device: str, dim: int = 32, queries: int = 40, keys: int = 50, dtype=torch.float32) -> tuple[Tensor, ...]:
    shapes = ((2, queries, 4, dim), (2, keys, 2, dim), (2, keys, 2, dim))
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_signatures(name):
    """Callers pass these by position."""
    assert list(inspect.signature(getattr(flash_attn, name)).parameters) == POSITIONS[name]


@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"softmax_scale": 0.3, "window_size": (9, 4)}, {"scale": 0.3, "window": (9, 4)}),
        ({"causal": True, "window_size": (9, 4), "softcap": 2.0}, {"causal": True, "window": (9, -1), "softcap": 2.0}),
        ({"window_size": (-1, 3), "deterministic": True}, {"window": (-1, 3)}),
    ],
    ids=str,
)
def test_func(options, same, dim, device):
    """Widths that are no multiple of 8 too, and the gradients."""
    given = tensors(device, dim)
    wanted, lse = expected(*given, **same)
    o, actual_lse, probabilities = flash_attn_func(*given, **options, return_attn_probs=True)
    assert probabilities.numel() == 0
    assert_close(o, wanted)
    assert_close(actual_lse, lse)
    assert_same_bits(flash_attn_func(*given, **options), o, "o alone")
    dout = torch.randn_like(o)
    for grad, want in zip(
        torch.autograd.grad(o, given, dout), torch.autograd.grad(wanted, given, dout.double()), strict=True
    ):
        assert_close(grad, want)


@pytest.mark.parametrize("per_row", [False, True])
def test_alibi(per_row, device):
    given = tensors(device)
    slopes = torch.rand((2, 4) if per_row else (4,), device=device)
    wanted, _ = expected(*given, causal=True, slopes=slopes)
    assert_close(flash_attn_func(*given, causal=True, alibi_slopes=slopes), wanted)


def test_packed_tensors_are_the_same(device):
    q, k, v = tensors(device, queries=50)
    kv = torch.stack([k, v], 2)
    wanted = flash_attn_func(q, k, v, causal=True)
    assert_same_bits(flash_attn_kvpacked_func(q, kv, causal=True), wanted, "kvpacked")
    qkv = torch.stack([q, q * 2, q * 3], 2).detach().requires_grad_()
    wanted = flash_attn_func(*qkv.unbind(2), 0.0, 0.2)
    o = flash_attn_qkvpacked_func(qkv, 0.0, 0.2)
    assert_same_bits(o, wanted, "qkvpacked")
    dout = torch.randn_like(o)
    grads = (torch.autograd.grad(y, qkv, dout)[0] for y in (o, wanted))
    assert_close(*grads)


def test_varlen(device):
    """Each sequence by itself, one of them empty, and one with fewer keys than queries: its first rows see nothing."""
    lengths = [(10, 10), (0, 3), (30, 20), (1, 25)]
    ends_q, ends_k = (
        torch.tensor([0, *column], device=device).cumsum(0).int() for column in zip(*lengths, strict=True)
    )
    q, k, v = (torch.randn(n, h, 32, device=device) for n, h in ((41, 4), (58, 2), (58, 2)))
    o, lse, _ = flash_attn_varlen_func(q, k, v, ends_q, ends_k, 30, 25, causal=True, return_attn_probs=True)
    assert o.shape == q.shape
    assert lse.shape == (4, 41)
    for i, (queries, keys) in enumerate(lengths):
        rows, columns = (slice(int(ends[i]), int(ends[i + 1])) for ends in (ends_q, ends_k))
        wanted, wanted_lse = expected(q[None, rows], k[None, columns], v[None, columns], causal=True)
        assert_close(o[rows], wanted[0])
        assert_close(lse[:, rows], wanted_lse[0])
        assert (wanted_lse[0, :, : max(0, queries - keys)] == -torch.inf).all()


def test_dropout(device):
    q, k, v = (x.detach() for x in tensors(device))
    torch.manual_seed(4)
    first = flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(4)
    assert_same_bits(flash_attn_func(q, k, v, dropout_p=0.5), first, "after the same seed")
    many = torch.stack([flash_attn_func(q, k, v, 0.5) for _ in range(400)]).mean(0)
    assert (many - flash_attn_func(q, k, v)).abs().mean() < 0.05


BAD = [
    (
        lambda q, k, v: flash_attn_func(q, k, v, 0.1, return_attn_probs=True),
        NotImplementedError,
        "return_attn_probs must",
    ),
    (
        lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=q.new_ones(3)),
        ValueError,
        r"alibi_slopes must have shape \[4\]",
    ),
    (lambda q, k, v: flash_attn_kvpacked_func(q, k), ValueError, r"kv must have shape \[B, S, 2, H, D\], got"),
    (lambda q, k, v: flash_attn_qkvpacked_func(q), ValueError, r"qkv must have shape \[B, S, 3, H, D\], got"),
    (
        lambda q, k, v: flash_attn_varlen_func(q, k, v, None, None, 1, 1),
        ValueError,
        r"q must have shape \[tokens, heads",
    ),
    (
        lambda q, k, v: flash_attn_varlen_func(q[0], k[0], v[0], None, None, 1, 1, block_table=q),
        NotImplementedError,
        "block_table must be None",
    ),
    (
        lambda q, k, v: flash_attn_varlen_func(q[0], k[0], v[0], None, None, 1, 1, alibi_slopes=q),
        NotImplementedError,
        "alibi_slopes must be None",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[text[:24] for *_, text in BAD])
def test_errors(call, error, text):
    with pytest.raises(error, match=rf"^flash_attn\w*_func: {text}"):
        call(*tensors("cpu"))
