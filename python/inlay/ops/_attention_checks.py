"""Every condition on attention's arguments, with a message that names the argument."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from inlay.ops import _checks as checks

MAX_HEAD_DIM = 512  # as in csrc/attention/params.h
HEAD_DIM_MULTIPLE = 8

_OP = "attention"


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: tuple[int | None, int | None],
    softcap: float,
    sinks: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    key_ranges: Tensor | None,
) -> None:
    _check_heads(q, k, v)
    _check_options(scale, window, softcap, dropout_p)
    if sinks is not None:
        checks.given(_OP, "sinks", sinks)
        if sinks.shape != q.shape[2:3]:
            raise ValueError(f"{_OP}: sinks must have shape [{q.shape[2]}] (Hq), got {list(sinks.shape)}")
        _check_beside(q, "sinks", sinks)
        if sinks.shape[0] > 1 and sinks.stride(0) != 1:
            raise ValueError(f"{_OP}: sinks must have stride 1, got {sinks.stride(0)}")
    if gate is not None:
        checks.given(_OP, "gate", gate)
        shape = [*q.shape[:3], v.shape[3]]
        if list(gate.shape) != shape:
            raise ValueError(f"{_OP}: gate must have shape {shape} (B, Sq, Hq, DV), got {list(gate.shape)}")
        checks.dtype(_OP, "gate", gate.dtype, (q.dtype,))
        checks.on_device(_OP, "gate", gate, q, of="q")
    for name, tensor in {"mask": mask, "bias": bias}.items():
        if tensor is not None:
            checks.given(_OP, name, tensor)
            _check_scores(name, tensor, q, k)
    if mask is not None:
        checks.dtype(_OP, "mask", mask.dtype, (torch.bool,))
    if bias is not None:
        _check_beside(q, "bias", bias)
    _check_sequences(q, k, mask, bias, cu_seqlens_q, cu_seqlens_k, kv_lengths)
    if key_ranges is not None:
        _check_ranges(key_ranges, q)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.supported(_OP, "q", q)
    for name, tensor, axes in (("q", q, "B, Sq, Hq, D"), ("k", k, "B, Sk, Hkv, D"), ("v", v, "B, Sk, Hkv, DV")):
        checks.given(_OP, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{_OP}: {name} must have shape [{axes}], got {list(tensor.shape)}")
        width = tensor.shape[3]
        if not 1 <= width <= MAX_HEAD_DIM or width % HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"{_OP}: {name} must have a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} in its last"
                f" dimension, got {width}"
            )
        checks.on_device(_OP, name, tensor, q, of="q")
        checks.dtype(_OP, name, tensor.dtype, (q.dtype,))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{_OP}: k must have shape [B, Sk, Hkv, D] with q's B and D {list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{_OP}: v must have shape [B, Sk, Hkv, DV] with k's B, Sk and Hkv {list(k.shape)}, got {list(v.shape)}"
        )
    heads, key_heads = q.shape[2], k.shape[2]
    if heads != key_heads and (heads == 0 or key_heads == 0 or heads % key_heads):
        raise ValueError(f"{_OP}: q must have a multiple of k's heads {key_heads}, got {heads}")


def _check_options(
    scale: float | None, window: tuple[int | None, int | None], softcap: float, dropout_p: float
) -> None:
    for name, value in {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}.items():
        if not (_is_number(value) or (name == "scale" and value is None)):
            raise TypeError(f"{_OP}: {name} must be a number, got {type(value).__name__}")
    if not softcap >= 0 or softcap == float("inf"):
        raise ValueError(f"{_OP}: softcap must be finite and at least 0, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{_OP}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"{_OP}: window must be a pair (left, right), got {window!r}")
    for limit in window:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | torch.SymInt)):
            raise TypeError(f"{_OP}: window must be of integers or None, got {limit!r}")
        if limit is not None and limit < 0:
            raise ValueError(f"{_OP}: window must be of numbers from 0, or None, got {limit}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _check_beside(q: Tensor, name: str, tensor: Tensor) -> None:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    checks.dtype(_OP, name, tensor.dtype, tuple(dict.fromkeys((q.dtype, wide))))
    checks.on_device(_OP, name, tensor, q, of="q")


def _check_scores(name: str, tensor: Tensor, q: Tensor, k: Tensor) -> None:
    full = [q.shape[0], q.shape[2], q.shape[1], k.shape[1]]
    tail = full[4 - tensor.dim() :] if tensor.dim() <= 4 else None
    if tail is None or any(size not in (1, whole) for size, whole in zip(tensor.shape, tail, strict=True)):
        raise ValueError(
            f"{_OP}: {name} must be broadcastable to {full} (B, Hq, Sq, Sk) by dimensions of 1, got"
            f" {list(tensor.shape)}"
        )
    checks.on_device(_OP, name, tensor, q, of="q")


def _check_sequences(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_lengths: Tensor | None,
) -> None:
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError(f"{_OP}: cu_seqlens_q must be given with cu_seqlens_k, got None")
    if cu_seqlens_q is not None:
        checks.offsets(_OP, "cu_seqlens_q", cu_seqlens_q, q, of="q")
        name = "cu_seqlens_q" if cu_seqlens_k is None else "cu_seqlens_k"
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        checks.offsets(_OP, name, keys, k, of="k")
        if keys.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{_OP}: cu_seqlens_k must have cu_seqlens_q's shape {list(cu_seqlens_q.shape)}, got {list(keys.shape)}"
            )
        reasons = {
            "mask": "the sizes of packed sequences are known to the device alone",
            "bias": "the sizes of packed sequences are known to the device alone",
            "kv_lengths": "cu_seqlens_k says how many keys there are",
        }
        for name, tensor in {"mask": mask, "bias": bias, "kv_lengths": kv_lengths}.items():
            if tensor is not None:
                raise ValueError(f"{_OP}: {name} must be None with cu_seqlens_q, as {reasons[name]}, got a Tensor")
    if kv_lengths is not None:
        checks.given(_OP, "kv_lengths", kv_lengths)
        checks.dtype(_OP, "kv_lengths", kv_lengths.dtype, (torch.int32, torch.int64))
        if kv_lengths.shape != q.shape[:1]:
            raise ValueError(f"{_OP}: kv_lengths must have shape [{q.shape[0]}] (B), got {list(kv_lengths.shape)}")
        checks.on_device(_OP, "kv_lengths", kv_lengths, q, of="q")
        if not kv_lengths.is_contiguous():
            raise ValueError(f"{_OP}: kv_lengths must be contiguous, got strides {list(kv_lengths.stride())}")
        if kv_lengths.device.type == "cpu" and not all(0 <= length <= k.shape[1] for length in kv_lengths.tolist()):
            raise ValueError(
                f"{_OP}: kv_lengths must be from 0 to the number of keys {k.shape[1]}, got {kv_lengths.tolist()}"
            )


def _check_ranges(key_ranges: Tensor, q: Tensor) -> None:
    checks.given(_OP, "key_ranges", key_ranges)
    checks.dtype(_OP, "key_ranges", key_ranges.dtype, (torch.int32,))
    batch, queries = q.shape[:2]
    if key_ranges.dim() != 3 or key_ranges.shape[0] not in (1, batch) or key_ranges.shape[1:] != (queries, 2):
        raise ValueError(
            f"{_OP}: key_ranges must have shape [{batch} or 1, {queries}, 2] (B, Sq, 2), got {list(key_ranges.shape)}"
        )
    checks.on_device(_OP, "key_ranges", key_ranges, q, of="q")
    if key_ranges.stride(2) != 1:
        raise ValueError(
            f"{_OP}: key_ranges must have stride 1 in its last dimension, got strides {list(key_ranges.stride())}"
        )
