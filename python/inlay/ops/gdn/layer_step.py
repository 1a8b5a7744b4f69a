"""A Gated DeltaNet layer between its projections, for a few tokens of each sequence: decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import changed_in_place
from inlay.ops.conv import MAX_WIDTH, MIN_WIDTH
from inlay.ops.gdn._checks import (
    HEAD_DIM_MULTIPLE,
    MAX_HEAD_DIM,
    check_no_overlap,
    check_state,
    check_states_out,
    wide_dtype,
)
from inlay.ops.gdn.step import MAX_STEP_TOKENS

_layer_step = _load.namespace().gdn_layer_step.default


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
    """A Gated DeltaNet layer between its projections, for 1 to 16 tokens of each sequence: decoding, in one launch.

    The same as these steps, with Hugging Face's rounding points between them:

        q, k, v = split(silu(causal_conv1d(mixed_qkv)))     on conv_state, which moves on
        g, beta = gdn_gates(a, b, A_log, dt_bias)           beta in b's dtype
        o       = gated_delta_step(q, k, v, g, beta, state, l2norm_qk=True)
        y       = gated_rms_norm(o, z, norm_weight)         stepwise, times silu(z)

    Args:
        mixed_qkv: [B, T, C] with 1 <= T <= 16 and C = 2 Hk K + Hv V: the channels of q, k and v, head by head.
        z: [B, T, Hv, V] in mixed_qkv's dtype, the output gate.
        a: [B, T, Hv], of any dtype; b: [B, T, Hv], mixed_qkv's or float32.
        conv_weight: [C, W] or [C, 1, W], contiguous, W from 2 to 8.
        conv_bias: [C] or None.
        A_log, dt_bias: [Hv].
        norm_weight: [V].
        conv_state: [B, C, L] in mixed_qkv's dtype with L >= W - 1, of any strides: the newest inputs of each channel,
            oldest first. Updated in place.
        state: [B, Hv, K, V], float32 or bfloat16, each [Hv, K, V] of it dense. Updated in place.
        key_heads: Hk, which divides Hv.
        eps: added to the mean square that o is normalised by.
        beta_scale: as for :func:`gdn_gates`.
        states_out: [B, T, Hv, K, V] in state's dtype, contiguous, or None: receives the state after each token, to
            return to when speculated tokens are rejected. The convolution's earlier states lie in conv_state itself,
            where that has T columns more than W - 1.

    mixed_qkv, z, a and b may be slices of one projection; the last dimension of z, a and b must have stride 1.

    Returns:
        y: [B, T, Hv, V] in mixed_qkv's dtype, contiguous. Not differentiable, and refused where a gradient is wanted.

    Source: the decoding branch of ``Qwen3NextGatedDeltaNet`` and ``Qwen3_5GatedDeltaNet`` in transformers.

    Raises:
        TypeError, ValueError: see :mod:`inlay.ops.gdn`.
    """
    arguments = (
        mixed_qkv, z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, states_out,
        key_heads, eps, beta_scale,
    )  # fmt: skip
    try:
        if checks.needs_grad(*arguments[:11]):
            raise ValueError(
                "gdn_layer_step: no tensor must require gradients, as the states are overwritten; use torch.no_grad(),"
                " or causal_conv1d, gdn_gates, gated_delta_rule and gated_rms_norm"
            )
        y = _layer_step(*arguments)
    except Exception:
        _check_layer_step(*arguments[:13])
        raise
    changed_in_place(conv_state, state, states_out)
    return y


def _check_layer_step(
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
    states_out: Tensor | None,
    key_heads: int,
) -> None:
    op, of = "gdn_layer_step", "mixed_qkv"
    checks.supported(op, "mixed_qkv", mixed_qkv)
    if mixed_qkv.dim() != 3:
        raise ValueError(f"{op}: mixed_qkv must have shape [B, T, C], got {list(mixed_qkv.shape)}")
    batch, tokens, channels = mixed_qkv.shape
    if not 1 <= tokens <= MAX_STEP_TOKENS:
        raise ValueError(f"{op}: mixed_qkv must have 1 to {MAX_STEP_TOKENS} tokens, got {tokens}")
    checks.given(op, "z", z)
    checks.on_device(op, "z", z, mixed_qkv, of=of)
    checks.activations(op, "z", z)
    if z.dim() != 4 or z.shape[:2] != mixed_qkv.shape[:2]:
        raise ValueError(
            f"{op}: z must have shape [B, T, Hv, V] with mixed_qkv's B and T {list(mixed_qkv.shape)},"
            f" got {list(z.shape)}"
        )
    checks.dtype(op, "z", z.dtype, (mixed_qkv.dtype,))
    value_heads, value_dim = z.shape[2:]
    if not isinstance(key_heads, int) or key_heads < 1 or value_heads < 1 or value_heads % key_heads:
        raise ValueError(f"{op}: key_heads must divide z's heads {value_heads}, got {key_heads!r}")
    checks.given(op, "state", state)
    key_dim = state.shape[2] if state.dim() == 4 else 0
    for name, size in (("z", value_dim), ("state", key_dim)):
        if not 1 <= size <= MAX_HEAD_DIM or size % HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"{op}: {name} must have a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} as"
                f" {'V' if name == 'z' else 'K of [B, Hv, K, V]'}, got {size}"
            )
    wanted = 2 * key_heads * key_dim + value_heads * value_dim
    if channels != wanted:
        raise ValueError(f"{op}: mixed_qkv must have 2 Hk K + Hv V = {wanted} channels, got {channels}")
    wide = wide_dtype(mixed_qkv)
    allowed = (torch.float64,) if wide == torch.float64 else checks.HALVES_AND_FLOAT32
    for name, tensor, dtypes in (("a", a, allowed), ("b", b, tuple({mixed_qkv.dtype, wide}))):
        checks.given(op, name, tensor)
        checks.on_device(op, name, tensor, mixed_qkv, of=of)
        checks.activations(op, name, tensor)
        if tensor.shape != z.shape[:3]:
            raise ValueError(f"{op}: {name} must have shape {list(z.shape[:3])} (B, T, Hv), got {list(tensor.shape)}")
        checks.dtype(op, name, tensor.dtype, dtypes)
    for name, tensor in {"A_log": A_log, "dt_bias": dt_bias}.items():
        checks.given(op, name, tensor)
        checks.vector(op, name, tensor, a, of="a")
    checks.given(op, "norm_weight", norm_weight)
    checks.vector(op, "norm_weight", norm_weight, z, of="z")
    _check_layer_conv(op, mixed_qkv, conv_weight, conv_bias, conv_state)
    check_state(op, "state", state, (batch, value_heads, key_dim, value_dim), "B, Hv, K, V", mixed_qkv, of)
    check_no_overlap(op, state)
    check_states_out(op, states_out, tokens, state, mixed_qkv, of)


def _check_layer_conv(
    op: str, mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor
) -> None:
    batch, _, channels = mixed_qkv.shape
    checks.given(op, "conv_weight", conv_weight)
    if tuple(conv_weight.shape[:-1]) not in ((channels,), (channels, 1)):
        raise ValueError(
            f"{op}: conv_weight must have shape [{channels}, W] or [{channels}, 1, W] (mixed_qkv's channels),"
            f" got {list(conv_weight.shape)}"
        )
    width = conv_weight.shape[-1]
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ValueError(f"{op}: conv_weight must be {MIN_WIDTH} to {MAX_WIDTH} wide, got {width}")
    checks.parameter(op, "conv_weight", conv_weight, mixed_qkv, of="mixed_qkv")
    if not conv_weight.is_contiguous():
        raise ValueError(f"{op}: conv_weight must be contiguous, got strides {list(conv_weight.stride())}")
    checks.vector(op, "conv_bias", conv_bias, mixed_qkv, of="mixed_qkv")
    checks.given(op, "conv_state", conv_state)
    if conv_state.dim() != 3 or conv_state.shape[:2] != (batch, channels) or conv_state.shape[2] < width - 1:
        raise ValueError(
            f"{op}: conv_state must have shape [{batch}, {channels}, L] with L at least {width - 1},"
            f" got {list(conv_state.shape)}"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(conv_state.stride(), conv_state.shape, strict=True)):
        raise ValueError(f"{op}: conv_state must not overlap itself, got strides {list(conv_state.stride())}")
    checks.dtype(op, "conv_state", conv_state.dtype, (mixed_qkv.dtype,))
    checks.on_device(op, "conv_state", conv_state, mixed_qkv, of="mixed_qkv")


@torch.library.register_fake("inlay::gdn_layer_step")
def _(
    mixed_qkv, z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, states_out,
    key_heads, eps, beta_scale,
):  # fmt: skip
    tensors = (z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, states_out)
    checks.same_device(mixed_qkv, *tensors)
    return mixed_qkv.new_empty(z.shape)
