"""Gated delta rules of https://github.com/fla-org/flash-linear-attention: ``from inlay.compat.fla import ...``.

Signatures as in its version 0.5.2. Differences: the CPU works as well, so does float32 (float64 on the CPU), the
recurrent form is differentiable, both compile in one graph, and unknown keywords raise ``TypeError``. Heads are a
multiple of 8 up to 256 wide. What stands for a choice of kernel and not of result (``chunk_size``, ``chunk_indices``,
``cu_seqlens_cpu``) is accepted and has no effect. See :mod:`inlay.ops.gdn` for the maths and the other errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.ops.gdn import gated_delta_rule, gdn_gates

_CHUNK_SIZES = (16, 32, 64)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over sequences, in chunks.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV] of any dtype: the log decay, or with ``use_gate_in_kernel`` what it is made of.
        beta: [B, T, HV] of any dtype: the betas, or with ``use_beta_sigmoid_in_kernel`` their logits.
        scale: of q; None is ``K ** -0.5``.
        initial_state: [N, HV, K, V] of any dtype, or None.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to normalise q and k.
        use_beta_sigmoid_in_kernel: beta is ``sigmoid(beta)``, in float32.
        allow_neg_eigval: it is ``2 sigmoid(beta)``.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] offsets of sequences packed into one batch row, or None.
        cu_seqlens_cpu, chunk_indices: without effect.
        cp_context: must be None.
        use_gate_in_kernel: g is ``-exp(A_log) softplus(g + dt_bias)``, in float32.
        A_log: [HV], with ``use_gate_in_kernel``.
        dt_bias: [HV] or None, with ``use_gate_in_kernel``.
        transpose_state_layout: an older name of ``state_v_first``.
        chunk_size: 16, 32 or 64, without effect.

    Returns:
        o: [B, T, HV, V] in q's dtype, and the final state in float32 (float64 for float64 q), or None.

    Raises:
        NotImplementedError: for ``cp_context``: sequences split over several devices.
        ValueError: for arguments that contradict each other, and see :mod:`inlay.ops.gdn`.
    """
    op = "chunk_gated_delta_rule"
    if cp_context is not None:
        raise NotImplementedError(f"{op}: cp_context must be None: no sequences split over devices")
    if chunk_size not in _CHUNK_SIZES:
        raise ValueError(f"{op}: chunk_size must be 16, 32 or 64, got {chunk_size}")
    g, beta = _gates(op, q, g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    v_first = _v_first(op, state_v_first, transpose_state_layout)
    return _rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, v_first, cu_seqlens, "auto"
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over sequences, token by token.

    Args:
        q, k, v, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, transpose_state_layout: as for
            :func:`chunk_gated_delta_rule`.
        g: [B, T, HV] or None: no decay.
        gk, gv: must be None.
        beta: [B, T, HV] or None: ones.

    Returns:
        o: [B, T, HV, V] in q's dtype, and the final state in float32 (float64 for float64 q), or None.

    Raises:
        NotImplementedError: for ``gk`` and ``gv``, decays by row or column of the state, and betas [B, T, HV, V].
        ValueError: for arguments that contradict each other, and see :mod:`inlay.ops.gdn`.
    """
    op = "fused_recurrent_gated_delta_rule"
    if gk is not None or gv is not None:
        raise NotImplementedError(f"{op}: {'gv' if gk is None else 'gk'} must be None: decays are per head, g")
    if beta is not None and beta.dim() == 4:
        raise NotImplementedError(f"{op}: beta must have shape [B, T, HV], got {list(beta.shape)}")
    if g is None:
        if use_gate_in_kernel:
            raise ValueError(f"{op}: g must be given with use_gate_in_kernel=True, got None")
        g = q.new_zeros(v.shape[:3], dtype=_wide(q))
    if beta is None:
        if use_beta_sigmoid_in_kernel:
            raise ValueError(f"{op}: beta must be given with use_beta_sigmoid_in_kernel=True, got None")
        beta = q.new_ones(v.shape[:3])
    g, beta = _gates(op, q, g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    v_first = _v_first(op, state_v_first, transpose_state_layout)
    return _rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, v_first, cu_seqlens,
        "recurrent",
    )  # fmt: skip


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def _gates(
    op: str,
    q: Tensor,
    g: Tensor,
    beta: Tensor,
    makes_g: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    makes_beta: bool,
    doubles_beta: bool,
) -> tuple[Tensor, Tensor]:
    """The log decay in float32 and beta in float32 or q's dtype."""
    if makes_g and A_log is None:
        raise ValueError(f"{op}: A_log must be given with use_gate_in_kernel=True, got None")
    if doubles_beta and not makes_beta:
        raise ValueError(f"{op}: use_beta_sigmoid_in_kernel must be True with allow_neg_eigval=True, got False")
    wide, beta_scale = _wide(q), 2.0 if doubles_beta else 1.0
    if makes_g and A_log is not None:
        dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
        logits = beta if makes_beta else g  # without logits its second result is not used
        g, sigmoid = gdn_gates(g, logits, A_log, dt_bias, beta_scale=beta_scale, beta_dtype=wide)
        beta = sigmoid if makes_beta else beta
    elif makes_beta:
        beta = beta.to(wide).sigmoid() * beta_scale
    return g.to(wide), beta if beta.dtype == q.dtype else beta.to(wide)


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm_qk: bool,
    v_first: bool,
    cu_seqlens: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if initial_state is not None:
        initial_state = (initial_state.mT if v_first else initial_state).to(_wide(q)).contiguous()
    results = gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        l2norm_qk=l2norm_qk, cu_seqlens=cu_seqlens, mode=mode, state_dtype=_wide(q),
    )  # fmt: skip
    if isinstance(results, Tensor):
        return results, None
    o, final_state = results
    return o, final_state.mT.contiguous() if v_first else final_state


def _v_first(op: str, state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{op}: transpose_state_layout must be None with state_v_first, whose older name it is")
    return transpose_state_layout


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
