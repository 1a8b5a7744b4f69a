"""The gated delta rule in eager PyTorch. See ``inlay.ops.gdn`` for what each argument means."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.reference.conv import causal_conv1d_step
from inlay.reference.norm import gated_rms_norm

L2_EPS = 1e-6
_CHUNK = 64
_RECURRENT_TOKENS = 16  # up to so many, "auto" is the token recurrence
_LEAST_GATE = {torch.float32: -104.0, torch.float64: -746.0}


def gdn_gates(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    beta_scale: float = 1.0,
    beta_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    g = -_widen(A_log).exp() * F.softplus(_widen(a) + _widen(dt_bias))
    beta = torch.sigmoid(_widen(b)) * beta_scale
    return g, beta.to(beta_dtype or b.dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    l2norm_qk: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: str = "auto",
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if mode == "auto":
        mode = "recurrent" if q.shape[1] <= _RECURRENT_TOKENS else "chunk"
    if state_dtype is None:
        state_dtype = _wide_dtype(q) if initial_state is None else initial_state.dtype
    rule = _chunk if mode == "chunk" else _recurrent
    inputs = _prepare(q, k, v, g, beta, scale, l2norm_qk)
    if cu_seqlens is None:
        o, state = rule(inputs, _state(initial_state, q, v, q.shape[0]))
    else:
        ends = cu_seqlens.tolist()
        states = _state(initial_state, q, v, len(ends) - 1)
        results = [
            rule(tuple(x[:, :, begin:end] for x in inputs), states[i : i + 1])
            for i, (begin, end) in enumerate(pairwise(ends))
        ]
        if results:
            o, state = (torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), (2, 0), strict=True))
        else:
            o, state = inputs[2][:, :, :0], states
    o = o.transpose(1, 2).to(v.dtype, memory_format=torch.contiguous_format)
    return (o, state.to(state_dtype)) if output_final_state else o


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    l2norm_qk: bool = False,
    states_out: Tensor | None = None,
) -> Tensor:
    inputs = _prepare(q, k, v, g, beta, scale, l2norm_qk)
    outputs, wide = [], _widen(state)
    for t in range(q.shape[1]):
        o, wide = _recurrent(tuple(x[:, :, t : t + 1] for x in inputs), wide)
        outputs.append(o)
        if states_out is not None:
            states_out[:, t].copy_(wide)
    state.copy_(wide)
    return torch.cat(outputs, 2).transpose(1, 2).to(v.dtype, memory_format=torch.contiguous_format)


def gdn_layer_step(
    mixed_qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    key_heads: int,
    eps: float = 1e-6,
    beta_scale: float = 1.0,
    states_out: Tensor | None = None,
) -> Tensor:
    convolved = causal_conv1d_step(mixed_qkv, conv_state, conv_weight, conv_bias, activation="silu")
    keys = key_heads * state.shape[2]
    q, k, v = convolved.split([keys, keys, z.shape[2] * z.shape[3]], -1)
    q, k = (x.unflatten(-1, (key_heads, state.shape[2])) for x in (q, k))
    g, beta = gdn_gates(a, b, A_log, dt_bias, beta_scale=beta_scale)
    o = gated_delta_step(q, k, v.unflatten(-1, z.shape[2:]), g, beta, state, l2norm_qk=True, states_out=states_out)
    return gated_rms_norm(o, z, norm_weight, eps=eps)


def _recurrent(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: the definition. q, k, v, g, beta are [B, Hv, T, ...] and wide, q scaled; state [B, Hv, K, V]."""
    q, k, v, g, beta = inputs
    outputs = [v[:, :, :0]]
    for t in range(v.shape[2]):
        key = k[:, :, t, :, None]
        state = state * g[:, :, t, None, None].exp()
        delta = beta[:, :, t, None] * (v[:, :, t] - (state * key).sum(-2))
        state = state + key * delta[:, :, None]
        outputs.append((state * q[:, :, t, :, None]).sum(-2)[:, :, None])
    return torch.cat(outputs, 2), state


def _chunk(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The same in chunks of 64 tokens, which are matrix products: what runs where there is no kernel.

    For a chunk with state S at its start, c the cumulated g, D_ij = exp(c_i - c_j) for i >= j and else 0:

        u = (1 + diag(beta) tril(k k^T, -1) * D)^-1 diag(beta) (v - exp(c) * k S)
        o = exp(c) * q S + (q k^T * D) u
        S <- exp(c_end) S + k^T (exp(c_end - c) * u)
    """
    q, k, v, g, beta = inputs
    tokens = v.shape[2]
    outputs = [v[:, :, :0]]
    for begin in range(0, tokens, _CHUNK):
        rows = slice(begin, min(begin + _CHUNK, tokens))
        queries, keys, values, betas = q[:, :, rows], k[:, :, rows], v[:, :, rows], beta[:, :, rows, None]
        # exp of less is zero: -inf then leaves no NaN, and no large sum costs later differences their digits.
        total = g[:, :, rows].clamp_min(_LEAST_GATE[g.dtype]).cumsum(-1)[..., None]
        size = total.shape[2]
        future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
        # Masked before the exponential: later tokens' differences are positive and may overflow.
        decay = (total - total.mT).masked_fill(future, -torch.inf).exp()
        system = ((betas * keys) @ keys.mT * decay).tril(-1)
        system = system + torch.eye(size, dtype=v.dtype, device=v.device)
        right = betas * (values - total.exp() * (keys @ state))
        u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        outputs.append(total.exp() * (queries @ state) + (queries @ keys.mT * decay) @ u)
        end = total[:, :, -1:]
        state = end.exp() * state + keys.mT @ ((end - total).exp() * u)
    return torch.cat(outputs, 2), state


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, l2norm_qk: bool
) -> tuple[Tensor, ...]:
    """Wide and [B, Hv, T, ...]; q and k normalised if asked for and repeated for their value heads, q scaled."""
    q, k, v, g, beta = (_widen(x).transpose(1, 2) for x in (q, k, v, g, beta))
    if l2norm_qk:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    group = v.shape[1] // k.shape[1]
    return q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v, g, beta


def _state(initial_state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    if initial_state is not None:
        return _widen(initial_state).clone()  # without tokens it is returned as it is
    return q.new_zeros((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=_wide_dtype(q))


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
