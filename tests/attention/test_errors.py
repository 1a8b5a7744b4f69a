"""Is every bad input refused with its argument's name, by the public function and again by the raw op?"""

from __future__ import annotations

import pytest
import torch

import inlay

B, SQ, SK, HQ, HK, D, DV = 2, 6, 7, 4, 2, 16, 24
ones = torch.ones
GOOD = {"q": torch.randn(B, SQ, HQ, D), "k": torch.randn(B, SK, HK, D), "v": torch.randn(B, SK, HK, DV)}


def cumulative(*offsets: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(offsets, dtype=dtype)


SCORES = r"must be broadcastable to \[2, 4, 6, 7\] \(B, Hq, Sq, Sk\) by dimensions of 1, got"
BAD = [
    ("q", [1.0], TypeError, "must be a Tensor, got list"),
    (
        "q",
        ones(B, SQ, HQ, D, dtype=torch.int64),
        ValueError,
        "must be float32 or bfloat16 or float16 or float64 on cpu",
    ),
    ("q", ones(B, SQ, HQ * D), ValueError, r"must have shape \[B, Sq, Hq, D\], got \[2, 6, 64\]"),
    ("q", ones(B, SQ, HQ, 12), ValueError, "must have a multiple of 8 up to 512 in its last dimension, got 12"),
    ("q", ones(B, SQ, HQ, 520), ValueError, "must have a multiple of 8 up to 512 in its last dimension, got 520"),
    ("q", ones(B, SQ, 3, D), ValueError, "must have a multiple of k's heads 2, got 3"),
    ("q", ones(B, SQ, 0, D), ValueError, "must have a multiple of k's heads 2, got 0"),
    ("k", None, TypeError, "must be a Tensor, got NoneType"),
    ("k", ones(B, SK, HK, 24), ValueError, r"must have shape \[B, Sk, Hkv, D\] with q's B and D \[2, 6, 4, 16\], got"),
    ("k", ones(1, SK, HK, D), ValueError, r"must have shape \[B, Sk, Hkv, D\] with q's B and D \[2, 6, 4, 16\], got"),
    ("k", ones(B, SK, HK, D).half(), ValueError, r"must be float32, got torch\.float16"),
    ("k", ones(B, SK, HK, D, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    ("v", ones(B, SK + 1, HK, DV), ValueError, r"must have shape \[B, Sk, Hkv, DV\] with k's B, Sk and Hkv"),
    ("v", ones(B, SK, HK, 4), ValueError, "must have a multiple of 8 up to 512 in its last dimension, got 4"),
    ("v", ones(B, SK, HK, DV).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("scale", "1", TypeError, "must be a number, got str"),
    ("softcap", None, TypeError, "must be a number, got NoneType"),
    ("softcap", -1.0, ValueError, r"must be finite and at least 0, got -1\.0"),
    ("softcap", float("inf"), ValueError, "must be finite and at least 0, got inf"),
    ("softcap", float("nan"), ValueError, "must be finite and at least 0, got nan"),
    ("dropout_p", 1.0, ValueError, r"must be at least 0 and below 1, got 1\.0"),
    ("dropout_p", -0.1, ValueError, r"must be at least 0 and below 1, got -0\.1"),
    ("window", 5, TypeError, r"must be a pair \(left, right\), got 5"),
    ("window", (5,), TypeError, r"must be a pair \(left, right\), got \(5,\)"),
    ("window", (-1, None), ValueError, "must be of numbers from 0, or None, got -1"),
    ("window", (None, 1.5), TypeError, r"must be of integers or None, got 1\.5"),
    ("sinks", [0.0] * HQ, TypeError, "must be a Tensor, got list"),
    ("sinks", ones(HK), ValueError, r"must have shape \[4\] \(Hq\), got \[2\]"),
    ("sinks", ones(HQ).half(), ValueError, r"must be float32, got torch\.float16"),
    ("sinks", ones(2 * HQ)[::2], ValueError, "must have stride 1, got 2"),
    ("sinks", ones(HQ, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    ("gate", ones(B, SQ, HQ, D), ValueError, r"must have shape \[2, 6, 4, 24\] \(B, Sq, Hq, DV\), got \[2, 6, 4, 16\]"),
    ("gate", ones(B, SQ, HQ, DV).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("mask", ones(B, HQ, SQ, SK), ValueError, r"must be bool, got torch\.float32"),
    ("mask", ones(B, HQ, SK, SQ).bool(), ValueError, rf"{SCORES} \[2, 4, 7, 6\]"),
    ("mask", ones(B, HK, SQ, SK).bool(), ValueError, rf"{SCORES} \[2, 2, 6, 7\]"),
    ("mask", ones(1, B, HQ, SQ, SK).bool(), ValueError, rf"{SCORES} \[1, 2, 4, 6, 7\]"),
    ("bias", ones(SQ + 1, SK), ValueError, rf"{SCORES} \[7, 7\]"),
    ("bias", ones(SQ, SK).bool(), ValueError, r"must be float32, got torch\.bool"),
    ("bias", ones(SQ, SK, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    ("kv_lengths", [1, 2], TypeError, "must be a Tensor, got list"),
    ("kv_lengths", ones(B), ValueError, r"must be int32 or int64, got torch\.float32"),
    ("kv_lengths", cumulative(1, 2, 3), ValueError, r"must have shape \[2\] \(B\), got \[3\]"),
    ("kv_lengths", cumulative(1, 8), ValueError, r"must be from 0 to the number of keys 7, got \[1, 8\]"),
    ("kv_lengths", cumulative(-1, 7), ValueError, r"must be from 0 to the number of keys 7, got \[-1, 7\]"),
    ("key_ranges", ones(B, SQ, 2), ValueError, r"must be int32, got torch\.float32"),
    ("key_ranges", ones(B, SK, 2).int(), ValueError, r"must have shape \[2 or 1, 6, 2\] \(B, Sq, 2\), got \[2, 7, 2\]"),
    ("key_ranges", ones(B, 2, SQ).int().mT, ValueError, "must have stride 1 in its last dimension"),
    ("cu_seqlens_k", cumulative(0, 7), ValueError, None),  # another argument is to blame
    ("cu_seqlens_q", cumulative(0, 6), ValueError, None),
]
BLAMED = {
    "cu_seqlens_k": "cu_seqlens_q must be given with cu_seqlens_k, got None",
    "cu_seqlens_q": "q must have a batch of 1 with cu_seqlens_q, got 2",
}


def ids(value):
    return value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD, ids=ids)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_attention(needs_grad, name, value, error, text):
    arguments = {**GOOD, "v": GOOD["v"].clone().requires_grad_(needs_grad), name: value}
    text = BLAMED[name] if text is None else f"{name} {text}"
    with pytest.raises(error, match=rf"^attention: {text}"):
        inlay.attention(**arguments)


PACKED = {name: t[:1] for name, t in GOOD.items()} | {
    "cu_seqlens_q": cumulative(0, 2, 6),
    "cu_seqlens_k": cumulative(0, 3, 7),
}
BAD_PACKED = [
    ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q must be a Tensor, got list"),
    ({"cu_seqlens_q": ones(3)}, ValueError, r"cu_seqlens_q must be int32 or int64, got torch\.float32"),
    (
        {"cu_seqlens_q": cumulative(0, 2, 5)},
        ValueError,
        "cu_seqlens_q must not decrease and lead from 0 to the number of",
    ),
    (
        {"cu_seqlens_k": cumulative(0, 9, 7)},
        ValueError,
        "cu_seqlens_k must not decrease and lead from 0 to the number of",
    ),
    ({"cu_seqlens_k": cumulative(0, 7)}, ValueError, r"cu_seqlens_k must have cu_seqlens_q's shape \[3\], got \[2\]"),
    ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q must not decrease and lead from 0 to the number of tokens 7"),
    (
        {"mask": ones(SQ, SK).bool()},
        ValueError,
        "mask must be None with cu_seqlens_q, as the sizes of packed sequences",
    ),
    ({"bias": ones(SQ, SK)}, ValueError, "bias must be None with cu_seqlens_q, as the sizes of packed sequences"),
    ({"kv_lengths": cumulative(7)}, ValueError, "kv_lengths must be None with cu_seqlens_q, as cu_seqlens_k says how"),
    ({"key_ranges": ones(2, SQ, 2).int()}, ValueError, r"key_ranges must have shape \[1 or 1, 6, 2\]"),
]


@pytest.mark.parametrize(("bad", "error", "text"), BAD_PACKED, ids=ids)
def test_packed(bad, error, text):
    inlay.attention(**PACKED)
    with pytest.raises(error, match=f"^attention: {text}"):
        inlay.attention(**{**PACKED, **bad})


BAD_RANGES = [
    ({"queries": -1}, "queries and keys must be at least 0 and chunk_size at least 1, got -1, 7, None"),
    ({"chunk_size": 0}, "queries and keys must be at least 0 and chunk_size at least 1, got 6, 7, 0"),
    ({"blocks": ones(2, 7)}, r"blocks must have shape \[B, queries\], got \[2, 7\]"),
    ({"starts": ones(2, 7)}, r"starts must have shape \[B\], got \[2, 7\]"),
    ({"prefix_lengths": torch.tensor(1)}, r"prefix_lengths must have shape \[B\], got \[\]"),
]


@pytest.mark.parametrize(("bad", "text"), BAD_RANGES, ids=ids)
def test_key_ranges(bad, text):
    with pytest.raises(ValueError, match=f"^key_ranges: {text}"):
        inlay.key_ranges(**{"queries": 6, "keys": 7, **bad})


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="attn_mask"):
        inlay.attention(**GOOD, attn_mask=None)


NONE = dict.fromkeys(
    ("gate", "sinks", "bias", "mask", "cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "key_ranges", "dropout_seed")
)
OPTIONS = {
    "scale": 0.25, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0, "allow_tf32": False,
}  # fmt: skip
FORWARD = {**GOOD, **NONE, **OPTIONS}
BACKWARD = {
    "dout": torch.randn(B, SQ, HQ, DV), "dlse": None, "o": torch.randn(B, SQ, HQ, DV), "lse": torch.randn(B, HQ, SQ),
    **FORWARD, "needs_dbias": False, "deterministic": True,
}  # fmt: skip
ROW = {name: t[:1] for name, t in GOOD.items()}
RAW = [
    ("attention", {"q": ones(B, SQ, D)}, r"q must have shape \[B, Sq, Hq, D\]"),
    ("attention", {"q": ones(B, SQ, D, HQ).mT}, "q must have stride 1 in its last dimension"),
    ("attention", {"q": ones(B, SQ, HQ, 12), "k": ones(B, SK, HK, 12)}, "q must have a multiple of 8 up to 512"),
    ("attention", {"k": ones(B, SK, HK, 8)}, r"k must have shape \[B, Sk, Hkv, D\] with q's B and D"),
    ("attention", {"k": ones(B, SK, HK, D).half()}, "k must be float32, got float16"),
    ("attention", {"q": ones(B, SQ, 3, D)}, "q must have a multiple of k's heads 2, got 3"),
    ("attention", {"v": ones(B, SK, HK, 4)}, "v must have a multiple of 8 up to 512"),
    ("attention", {"v": ones(B, 1, HK, DV)}, r"v must have shape \[B, Sk, Hkv, DV\] with k's B, Sk and Hkv"),
    ("attention", {"gate": ones(B, SQ, HQ, D)}, r"gate must have shape \[2, 6, 4, 24\]"),
    ("attention", {"gate": ones(B, SQ, HQ, DV).half()}, "gate must be float32, got float16"),
    ("attention", {"sinks": ones(HK)}, r"sinks must have shape \[4\] \(Hq\), got \[2\]"),
    ("attention", {"sinks": ones(HQ).half()}, "sinks must be float32, got float16"),
    ("attention", {"mask": ones(B, HQ, SQ, SK)}, "mask must be bool"),
    ("attention", {"mask": ones(SQ, SK).bool()}, "mask must have 4 dimensions, got 2"),
    ("attention", {"bias": ones(B, HK, SQ, SK)}, "bias must be broadcastable .* got size 2 for 4 in dimension 1"),
    ("attention", {"bias": ones(B, HQ, SQ, SK).half()}, "bias must be float32, got float16"),
    ("attention", {"kv_lengths": ones(B)}, "kv_lengths must be int32 or int64"),
    ("attention", {"kv_lengths": cumulative(1)}, r"kv_lengths must have shape \[2\], got 1 elements"),
    ("attention", {"key_ranges": ones(B, SQ, 2)}, "key_ranges must be int32"),
    ("attention", {"key_ranges": ones(B, SQ, 3).int()}, r"key_ranges must have shape \[B or 1, Sq, 2\]"),
    ("attention", {"window_left": -2}, r"window_left must be -1 \(no limit\) or from 0, got -2"),
    ("attention", {"softcap": -1.0}, "softcap must be finite and at least 0"),
    ("attention", {"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1"),
    ("attention", {"dropout_p": 0.5}, "dropout_seed must be given exactly when dropout_p is above 0"),
    ("attention", {"dropout_p": 0.5, "dropout_seed": ones(1)}, "dropout_seed must be one int64"),
    ("attention", {"cu_seqlens_q": cumulative(0, 6)}, "q must have a batch of 1 with cu_seqlens_q, got 2"),
    ("attention", {**ROW, "cu_seqlens_q": cumulative(0, 6)}, "cu_seqlens_q and cu_seqlens_k must be given together"),
    (
        "attention",
        {**ROW, "cu_seqlens_q": cumulative(0, 6), "cu_seqlens_k": cumulative(0, 0, 7)},
        "cu_seqlens_k must have as many sequences as cu_seqlens_q, 1, got 2",
    ),
    (
        "attention",
        {**ROW, "cu_seqlens_q": cumulative(0, 6), "cu_seqlens_k": cumulative(0, 7), "kv_lengths": cumulative(7)},
        "kv_lengths must be None with cu_seqlens_q",
    ),
    ("attention_bwd", {"dout": ones(B, SQ, HQ, D)}, r"dout must have shape \[2, 6, 4, 24\]"),
    ("attention_bwd", {"dout": ones(B, SQ, HQ, DV).half()}, "dout must be float32, got float16"),
    ("attention_bwd", {"o": ones(B, SQ, HQ, D)}, r"o must have shape \[2, 6, 4, 24\]"),
    ("attention_bwd", {"lse": ones(B, SQ, HQ)}, r"lse must have shape \[2, 4, 6\]"),
    ("attention_bwd", {"lse": ones(B, HQ, SQ).half()}, "lse must be float32, got float16"),
    ("attention_bwd", {"dlse": ones(B, SQ, HQ).mT}, "lse and dlse must be contiguous"),
    ("attention_bwd", {"needs_dbias": True}, "bias must be given when its gradient is wanted, got None"),
]


@pytest.mark.parametrize(("op", "bad", "text"), RAW, ids=ids)
def test_raw_ops(op, bad, text):
    raw, good = getattr(torch.ops.inlay, op), FORWARD if op == "attention" else BACKWARD
    raw(**good)
    with pytest.raises(RuntimeError, match=f"{op}: {text}"):
        raw(**{**good, **bad})


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"cu_seqlens_q": cumulative(1, 6), "cu_seqlens_k": cumulative(0, 7)}, "cu_seqlens_q must start with 0, got 1"),
        ({"cu_seqlens_q": cumulative(0, 6), "cu_seqlens_k": cumulative(0, 9)}, "cu_seqlens_k must end with the number"),
        ({"kv_lengths": cumulative(8)}, "kv_lengths must be from 0 to the number of keys 7, got 8"),
    ],
    ids=ids,
)
@pytest.mark.parametrize("op", ["attention", "attention_bwd"])
def test_raw_ops_look_at_values_on_the_cpu(op, bad, text):
    arguments = {**(FORWARD if op == "attention" else BACKWARD), **ROW}
    if op == "attention_bwd":
        arguments |= {name: arguments[name][:1] for name in ("dout", "o", "lse")}
    with pytest.raises(RuntimeError, match=f"{op}: {text}"):
        getattr(torch.ops.inlay, op)(**{**arguments, **bad})
