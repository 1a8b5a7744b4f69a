"""What the gated delta rule and its steps ask of their arguments alike."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.ops import _checks as checks

# As in csrc/gdn/params.h.
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tokens(op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    checks.activations(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"{op}: q must have shape [B, T, Hk, K], got {list(q.shape)}")
    checks.like(op, "k", k, q, dtypes=(q.dtype,), of="q")
    checks.activations(op, "v", v)
    if v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"{op}: v must have shape [B, T, Hv, V] with q's B and T {list(q.shape)}, got {list(v.shape)}")
    checks.dtype(op, "v", v.dtype, (q.dtype,))
    checks.on_device(op, "v", v, q, of="q")
    if q.shape[2] < 1 or v.shape[2] < 1 or v.shape[2] % q.shape[2]:
        raise ValueError(f"{op}: v must have a multiple of q's heads {q.shape[2]}, got {v.shape[2]}")
    for name, tensor in {"q": q, "v": v}.items():
        width = tensor.shape[3]
        if not 1 <= width <= MAX_HEAD_DIM or width % HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"{op}: {name} must have a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} in its last"
                f" dimension, got {width}"
            )
    for name, tensor, dtypes in (("g", g, {wide_dtype(q)}), ("beta", beta, {q.dtype, wide_dtype(q)})):
        checks.given(op, name, tensor)
        if tensor.shape != v.shape[:3]:
            raise ValueError(f"{op}: {name} must have shape {list(v.shape[:3])} (B, T, Hv), got {list(tensor.shape)}")
        checks.dtype(op, name, tensor.dtype, tuple(dtypes))
        checks.on_device(op, name, tensor, q, of="q")


def check_state(op: str, name: str, state: Tensor, shape: tuple[int, ...], axes: str, q: Tensor, of: str) -> None:
    """Of q's device, in a dtype that goes with q's; the op calls q ``of``."""
    checks.given(op, name, state)
    if state.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)} ({axes}), got {list(state.shape)}")
    allowed = (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    checks.dtype(op, name, state.dtype, allowed)
    checks.on_device(op, name, state, q, of=of)
    if state.numel() > 0 and not (state.stride(-1) == 1 and state.stride(-2) == state.shape[-1]):
        raise ValueError(
            f"{op}: {name} must have dense matrices [K, V], got strides {list(state.stride())};"
            " call .contiguous() first"
        )


def check_no_overlap(op: str, state: Tensor) -> None:
    batch = state.shape[0]
    if batch > 0 and (not state[0:1].is_contiguous() or (batch > 1 and state.stride(0) < state[0].numel())):
        raise ValueError(
            f"{op}: state must not overlap itself: a dense [Hv, K, V] for each of the batch, got strides"
            f" {list(state.stride())}"
        )


def check_states_out(op: str, states_out: Tensor | None, tokens: int, state: Tensor, q: Tensor, of: str) -> None:
    """Of a checked ``state`` after each of the tokens; None: not wanted."""
    if states_out is None:
        return
    shape = (state.shape[0], tokens, *state.shape[1:])
    check_state(op, "states_out", states_out, shape, "B, T, Hv, K, V", q, of)
    checks.dtype(op, "states_out", states_out.dtype, (state.dtype,))
    if not states_out.is_contiguous():
        raise ValueError(f"{op}: states_out must be contiguous, got strides {list(states_out.stride())}")
