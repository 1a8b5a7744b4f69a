"""The gated delta rule of Gated DeltaNet layers, over whole sequences and token by token, and its gates.

Per sequence and value head, with a state S of [K, V] that starts from ``initial_state`` or zeros, in float32 (float64
for float64 input):

    S <- exp(g_t) S
    u  = beta_t (v_t - S^T k_t)          what the state lacks to answer v_t when asked for k_t
    S <- S + k_t u^T
    o_t = scale S^T q_t

Sequences are worked on in chunks of 64 tokens, as matrix products; only the state goes from chunk to chunk. Decays are
exponentials of differences of cumulated log decays, never ratios of exponentials, so that no gate overflows, however
strong; each chunk's triangular system is inverted by forward substitution, which keys that resemble each other do not
upset. A gate of -inf forgets everything. NaN in a gate, a key or a value makes its head's later outputs and final state
NaN, and may make earlier ones of its chunk NaN.

Value heads share key heads in groups: value head h uses key head ``h // (Hv / Hk)``.

Sources: Gated DeltaNet https://arxiv.org/abs/2412.06464, the chunked form https://arxiv.org/abs/2406.06484, and
``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule`` in transformers' Qwen3-Next and Qwen3.5.

Shapes: q and k [B, T, Hk, K], v [B, T, Hv, V], g and beta [B, T, Hv], states [N, Hv, K, V] with N sequences. Hv is a
multiple of Hk; K and V are multiples of 8 up to 256 and may differ. q, k and v may be strided (slices of a packed
projection are read in place); their last dimension must have stride 1. Outputs are contiguous.

Dtypes: q, k and v alike float32, bfloat16 or float16 (float64 on the CPU); g float32; beta float32 or q's; states
float32, or bfloat16 at half the memory. With float64 q everything is float64.

Raises ``TypeError`` for a non-tensor and ``ValueError`` for a wrong dtype, shape, device or stride, naming the
argument.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from inlay import _load, reference
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function, changed_in_place
from inlay.ops.conv import MAX_WIDTH, MIN_WIDTH


class Mode(IntEnum):
    """Mirrors ``inlay::gdn::Mode`` in csrc/gdn/params.h."""

    AUTO = 0
    CHUNK = 1
    RECURRENT = 2


_MODE = {mode.name.lower(): int(mode) for mode in Mode}
_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
_CHUNK_SHARED_BYTES = 227 * 1024
MAX_STEP_TOKENS = 16  # as in csrc/gdn/params.h

_ops = _load.namespace()
_gdn_gates = _ops.gdn_gates.default
_gdn_gates_bwd = _ops.gdn_gates_bwd.default
_rule = _ops.gated_delta_rule.default
_rule_bwd = _ops.gated_delta_rule_bwd.default
_step = _ops.gated_delta_step.default
_layer_step = _ops.gdn_layer_step.default


def _has_kernel(q: Tensor, mode: str, needs_grad: bool) -> bool:
    """Whether the rule is the native op; else it is the reference.

    On CUDA the kernels for chunks, and so the backward, are for 16-bit values, which tensor cores multiply.
    """
    if q.device.type != "cuda" or (q.dtype != torch.float32 and _has_room_for_chunks(q.device)):
        return True
    return not needs_grad and mode != "chunk"


@torch.compiler.assume_constant_result
def _has_room_for_chunks(device: torch.device) -> bool:
    """Whether a block of the GPU can have the shared memory that the kernels for chunks take: on compute capability
    9.0 and 10.0 it can. The native side looks at the same number."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know the attribute
    return properties.shared_memory_per_block_optin >= _CHUNK_SHARED_BYTES


def gdn_gates(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    beta_scale: float = 1.0,
    beta_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The gates of a Gated DeltaNet layer: ``g = -exp(A_log) softplus(a + dt_bias)``, ``beta = beta_scale sigmoid(b)``.

    Args:
        a, b: [..., Hv], projections of the hidden states; of any dtype, float64 together.
        A_log, dt_bias: [Hv].
        beta_scale: 2.0 where a layer allows negative eigenvalues (OLMo-Hybrid).
        beta_dtype: None is b's dtype, as in Hugging Face's layers; float32 keeps the digits of the sigmoid.

    Returns:
        g: [..., Hv], the log decay, <= 0, float32 (float64 for float64 a); and beta: [..., Hv] in ``beta_dtype``.
        Both contiguous, computed in float32 and rounded once. Differentiable in all four tensors.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    try:
        arguments = (a, b, A_log, dt_bias, beta_scale, b.dtype if beta_dtype is None else beta_dtype)
        if checks.needs_grad(a, b, A_log, dt_bias):
            return _GdnGates.apply(*arguments)
        return _gdn_gates(*arguments)
    except Exception:
        _check_gates(a, b, A_log, dt_bias, beta_dtype)
        raise


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
    """The gated delta rule over sequences, see the module's docstring for the formula.

    Args:
        q, k: [B, T, Hk, K].
        v: [B, T, Hv, V].
        g: [B, T, Hv], log decay, <= 0.
        beta: [B, T, Hv], how much of what the state lacks is written: 0 to 1, or up to 2.
        scale: of q; None is ``K ** -0.5``.
        initial_state: [N, Hv, K, V] or None (zeros); N is B, or the number of packed sequences.
        output_final_state: whether to return the states after the last tokens.
        l2norm_qk: divide each row of q and k by ``sqrt(sum of squares + 1e-6)`` first, in float32.
        cu_seqlens: [N + 1] int32 or int64 on q's device: token offsets of sequences packed into the one batch row
            (B = 1), from 0 to T, not decreasing; sequences may be empty. Each starts from its own initial state, so
            nothing leaks from one into the next. Values are checked on the CPU alone: elsewhere that would wait for
            the device.
        mode: ``"chunk"``, ``"recurrent"`` (token by token, for few tokens), or ``"auto"``: whichever is faster for each
            sequence's length. They agree to rounding; gradients are the same.
            On CUDA ``"auto"`` is ``"chunk"`` for 16-bit q: packed sequences then give the bits they give alone,
            whatever their lengths. Float32 there is the recurrence, without gradients; with them, or as ``"chunk"``,
            it is eager code, which waits for the device to read ``cu_seqlens``.
        state_dtype: of the final state; None is initial_state's dtype, or float32 without one.

    Returns:
        o: [B, T, Hv, V] in q's dtype; with ``output_final_state`` also the final state, [N, Hv, K, V].

    Differentiable in q, k, v, g, beta and initial_state, from the gradients of o and of the final state.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    try:
        needs_grad = checks.needs_grad(q, k, v, g, beta, initial_state)
        if not _has_kernel(q, mode, needs_grad):
            _check_rule("gated_delta_rule", q, k, v, g, beta, initial_state, cu_seqlens, mode, state_dtype)
            return reference.gated_delta_rule(
                q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
                l2norm_qk=l2norm_qk, cu_seqlens=cu_seqlens, mode=mode, state_dtype=state_dtype,
            )  # fmt: skip
        if state_dtype is None:
            state_dtype = _wide_dtype(q) if initial_state is None else initial_state.dtype
        arguments = (
            q, k, v, g, beta, initial_state, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, l2norm_qk,
            output_final_state, state_dtype, _MODE[mode],
        )  # fmt: skip
        if needs_grad:
            o, final_state = _GatedDeltaRule.apply(*arguments)
        else:
            o, final_state = _rule(*arguments)
        return (o, final_state) if output_final_state else o
    except Exception:
        _check_rule("gated_delta_rule", q, k, v, g, beta, initial_state, cu_seqlens, mode, state_dtype)
        raise


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
    """The gated delta rule for 1 to 16 tokens of each sequence, on states that are updated in place: decoding.

    Args:
        q, k, v, g, beta, scale, l2norm_qk: as for :func:`gated_delta_rule`, with 1 <= T <= 16.
        state: [B, Hv, K, V], float32 or bfloat16, each [Hv, K, V] of it dense; overwritten by the state after the last
            token. Between the tokens of a call it is float32.
        states_out: [B, T, Hv, K, V] in state's dtype, contiguous, or None: receives the state after each token, to
            return to when speculated tokens are rejected.

    Returns:
        o: [B, T, Hv, V] in q's dtype. Not differentiable, and refused where a gradient is wanted:
        ``gated_delta_rule(mode="recurrent")`` computes the same.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    try:
        if checks.needs_grad(q, k, v, g, beta, state):
            raise ValueError(
                "gated_delta_step: q, k, v, g, beta and state must not require gradients, as the state is overwritten;"
                ' use gated_delta_rule(mode="recurrent"), or torch.no_grad()'
            )
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o = _step(q, k, v, g, beta, state, states_out, scale, l2norm_qk)
    except Exception:
        _check_step(q, k, v, g, beta, state, states_out)
        raise
    changed_in_place(state, states_out)
    return o


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

    mixed_qkv, z, a and b may be slices of one projection; the last dimension of z, a and b must have stride 1.

    Returns:
        y: [B, T, Hv, V] in mixed_qkv's dtype, contiguous. Not differentiable, and refused where a gradient is wanted.

    Source: the decoding branch of ``Qwen3NextGatedDeltaNet`` and ``Qwen3_5GatedDeltaNet`` in transformers.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments = (
        mixed_qkv, z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, key_heads, eps,
        beta_scale,
    )  # fmt: skip
    try:
        if checks.needs_grad(*arguments[:11]):
            raise ValueError(
                "gdn_layer_step: no tensor must require gradients, as the states are overwritten; use torch.no_grad(),"
                " or causal_conv1d, gdn_gates, gated_delta_rule and gated_rms_norm"
            )
        y = _layer_step(*arguments)
    except Exception:
        _check_layer_step(*arguments[:12])
        raise
    changed_in_place(conv_state, state)
    return y


class _GdnGates(Function):
    """Saves the inputs alone; the gates are recomputed in the backward."""

    @staticmethod
    def forward(a, b, A_log, dt_bias, beta_scale, beta_dtype):  # type: ignore[override]
        return _gdn_gates(a, b, A_log, dt_bias, beta_scale, beta_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, beta_scale, _beta_dtype = inputs
        ctx.save_for_backward(*tensors)
        ctx.beta_scale = beta_scale

    @staticmethod
    def backward(ctx: Any, dg: Tensor, dbeta: Tensor):  # type: ignore[override]
        needs_log, needs_bias = ctx.needs_input_grad[2:4]
        da, db, dlog, dbias = _gdn_gates_bwd(
            checks.dense_gradient(dg), checks.dense_gradient(dbeta), *ctx.saved_tensors, ctx.beta_scale,
            needs_log or needs_bias,
        )  # fmt: skip
        return da, db, dlog if needs_log else None, dbias if needs_bias else None, None, None


class _GatedDeltaRule(Function):
    """Saves the inputs alone; the backward recomputes the chunks' states."""

    @staticmethod
    def forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk, output_final_state, state_dtype, mode):  # type: ignore[override]
        return _rule(
            q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk, output_final_state, state_dtype, mode
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, scale, l2norm_qk, output_final_state, _state_dtype, _mode = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if not output_final_state:
            ctx.mark_non_differentiable(output[1])
        ctx.constants = scale, l2norm_qk, output_final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None):  # type: ignore[override]
        q, k, v, g, beta, initial_state, cu_seqlens = ctx.saved_tensors
        scale, l2norm_qk, output_final_state = ctx.constants
        if not output_final_state:  # a traced graph hands over a gradient of the empty tensor in its place
            dfinal_state = None
        if do is None and dfinal_state is None:
            return (None,) * 12
        do = v.new_zeros(v.shape) if do is None else do if do.stride(-1) == 1 else do.contiguous()
        if dfinal_state is not None:
            dfinal_state = dfinal_state.contiguous()
        needs_dinitial_state = ctx.needs_input_grad[5]
        *gradients, dinitial_state = _rule_bwd(
            do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk, needs_dinitial_state
        )
        return *gradients, dinitial_state if needs_dinitial_state else None, *[None] * 6


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_dtype: torch.dtype | None) -> None:
    op = "gdn_gates"
    checks.activations(op, "a", a)
    allowed = (torch.float64,) if a.dtype == torch.float64 else checks.HALVES_AND_FLOAT32
    checks.like(op, "b", b, a, dtypes=allowed, of="a")
    for name, tensor in {"A_log": A_log, "dt_bias": dt_bias}.items():
        checks.given(op, name, tensor)
        checks.vector(op, name, tensor, a, of="a")
    checks.dtype(op, "beta_dtype", b.dtype if beta_dtype is None else beta_dtype, allowed)


def _check_rule(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    state_dtype: torch.dtype | None,
) -> None:
    _check_tokens(op, q, k, v, g, beta)
    checks.choice(op, "mode", mode, _MODE)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        checks.offsets(op, "cu_seqlens", cu_seqlens, q, of="q")
        sequences = cu_seqlens.shape[0] - 1
    allowed = (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    if initial_state is not None:
        shape = (sequences, v.shape[2], q.shape[3], v.shape[3])
        _check_state(op, "initial_state", initial_state, shape, "N, Hv, K, V", q, "q")
    if state_dtype is not None:
        checks.dtype(op, "state_dtype", state_dtype, allowed)


def _check_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, states_out: Tensor | None
) -> None:
    op = "gated_delta_step"
    _check_tokens(op, q, k, v, g, beta)
    batch, tokens = q.shape[:2]
    if not 1 <= tokens <= MAX_STEP_TOKENS:
        raise ValueError(f"{op}: q must have 1 to {MAX_STEP_TOKENS} tokens, got {tokens}")
    matrices = (v.shape[2], q.shape[3], v.shape[3])
    _check_state(op, "state", state, (batch, *matrices), "N, Hv, K, V", q, "q")
    _check_no_overlap(op, state)
    if states_out is not None:
        _check_state(op, "states_out", states_out, (batch, tokens, *matrices), "B, T, Hv, K, V", q, "q")
        checks.dtype(op, "states_out", states_out.dtype, (state.dtype,))
        if not states_out.is_contiguous():
            raise ValueError(f"{op}: states_out must be contiguous, got strides {list(states_out.stride())}")


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
        if not 1 <= size <= _MAX_HEAD_DIM or size % _HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"{op}: {name} must have a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM} as"
                f" {'V' if name == 'z' else 'K of [B, Hv, K, V]'}, got {size}"
            )
    wanted = 2 * key_heads * key_dim + value_heads * value_dim
    if channels != wanted:
        raise ValueError(f"{op}: mixed_qkv must have 2 Hk K + Hv V = {wanted} channels, got {channels}")
    wide = _wide_dtype(mixed_qkv)
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
    _check_state(op, "state", state, (batch, value_heads, key_dim, value_dim), "B, Hv, K, V", mixed_qkv, of)
    _check_no_overlap(op, state)


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


def _check_tokens(op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
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
        if not 1 <= width <= _MAX_HEAD_DIM or width % _HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"{op}: {name} must have a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM} in its last"
                f" dimension, got {width}"
            )
    for name, tensor, dtypes in (("g", g, {_wide_dtype(q)}), ("beta", beta, {q.dtype, _wide_dtype(q)})):
        checks.given(op, name, tensor)
        if tensor.shape != v.shape[:3]:
            raise ValueError(f"{op}: {name} must have shape {list(v.shape[:3])} (B, T, Hv), got {list(tensor.shape)}")
        checks.dtype(op, name, tensor.dtype, tuple(dtypes))
        checks.on_device(op, name, tensor, q, of="q")


def _check_state(op: str, name: str, state: Tensor, shape: tuple[int, ...], axes: str, q: Tensor, of: str) -> None:
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


def _check_no_overlap(op: str, state: Tensor) -> None:
    batch = state.shape[0]
    if batch > 0 and (not state[0:1].is_contiguous() or (batch > 1 and state.stride(0) < state[0].numel())):
        raise ValueError(
            f"{op}: state must not overlap itself: a dense [Hv, K, V] for each of the batch, got strides"
            f" {list(state.stride())}"
        )


@torch.library.register_fake("inlay::gdn_gates")
def _(a, b, A_log, dt_bias, beta_scale, beta_dtype):
    checks.same_device(a, b, A_log, dt_bias)
    return a.new_empty(a.shape, dtype=_wide_dtype(a)), a.new_empty(a.shape, dtype=beta_dtype)


@torch.library.register_fake("inlay::gdn_gates_bwd")
def _(dg, dbeta, a, b, A_log, dt_bias, beta_scale, needs_vectors):
    checks.same_device(a, b, A_log, dt_bias, dg, dbeta)
    vectors = (A_log, dt_bias)
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        *(a.new_empty(a.shape[-1:] if needs_vectors else (0,), dtype=vector.dtype) for vector in vectors),
    )


@torch.library.register_fake("inlay::gated_delta_rule")
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk, output_final_state, state_dtype, mode):
    checks.same_device(q, k, v, g, beta, initial_state, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return q.new_empty(v.shape), q.new_empty(shape, dtype=state_dtype)


@torch.library.register_fake("inlay::gated_delta_rule_bwd")
def _(
    dout, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk, needs_dinitial_state
):  # fmt: skip
    checks.same_device(q, k, v, g, beta, dout, dfinal_state, initial_state, cu_seqlens)
    dinitial_state = (
        initial_state.new_empty(initial_state.shape)
        if needs_dinitial_state
        else q.new_empty((0,), dtype=_wide_dtype(q) if initial_state is None else initial_state.dtype)
    )
    dg, dbeta = g.new_empty(g.shape), beta.new_empty(beta.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(v.shape), dg, dbeta, dinitial_state


@torch.library.register_fake("inlay::gated_delta_step")
def _(q, k, v, g, beta, state, states_out, scale, l2norm_qk):
    checks.same_device(q, k, v, g, beta, state, states_out)
    return q.new_empty(v.shape)


@torch.library.register_fake("inlay::gdn_layer_step")
def _(
    mixed_qkv, z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, key_heads, eps,
    beta_scale,
):  # fmt: skip
    tensors = (z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state)
    checks.same_device(mixed_qkv, *tensors)
    return mixed_qkv.new_empty(z.shape)
