"""The gated delta rule over sequences."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from inlay import _load, reference
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function
from inlay.ops.gdn._checks import check_state, check_tokens, wide_dtype


class Mode(IntEnum):
    """Mirrors ``inlay::gdn::Mode`` in csrc/gdn/params.h."""

    AUTO = 0
    CHUNK = 1
    RECURRENT = 2


_MODE = {mode.name.lower(): int(mode) for mode in Mode}
_CHUNK_SHARED_BYTES = 227 * 1024

_ops = _load.namespace()
_rule = _ops.gated_delta_rule.default
_rule_bwd = _ops.gated_delta_rule_bwd.default


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
    """The gated delta rule over sequences, see :mod:`inlay.ops.gdn` for the formula.

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
        TypeError, ValueError: see :mod:`inlay.ops.gdn`.
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
            state_dtype = wide_dtype(q) if initial_state is None else initial_state.dtype
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
    check_tokens(op, q, k, v, g, beta)
    checks.choice(op, "mode", mode, _MODE)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        checks.offsets(op, "cu_seqlens", cu_seqlens, q, of="q")
        sequences = cu_seqlens.shape[0] - 1
    allowed = (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    if initial_state is not None:
        shape = (sequences, v.shape[2], q.shape[3], v.shape[3])
        check_state(op, "initial_state", initial_state, shape, "N, Hv, K, V", q, "q")
    if state_dtype is not None:
        checks.dtype(op, "state_dtype", state_dtype, allowed)


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
        else q.new_empty((0,), dtype=wide_dtype(q) if initial_state is None else initial_state.dtype)
    )
    dg, dbeta = g.new_empty(g.shape), beta.new_empty(beta.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(v.shape), dg, dbeta, dinitial_state
