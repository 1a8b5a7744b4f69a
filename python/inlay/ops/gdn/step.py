"""The gated delta rule for a few tokens of each sequence: decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import changed_in_place
from inlay.ops.gdn._checks import check_no_overlap, check_state, check_states_out, check_tokens

MAX_STEP_TOKENS = 16  # as in csrc/gdn/params.h

_step = _load.namespace().gated_delta_step.default


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
        TypeError, ValueError: see :mod:`inlay.ops.gdn`.
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


def _check_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, states_out: Tensor | None
) -> None:
    op = "gated_delta_step"
    check_tokens(op, q, k, v, g, beta)
    batch, tokens = q.shape[:2]
    if not 1 <= tokens <= MAX_STEP_TOKENS:
        raise ValueError(f"{op}: q must have 1 to {MAX_STEP_TOKENS} tokens, got {tokens}")
    matrices = (v.shape[2], q.shape[3], v.shape[3])
    check_state(op, "state", state, (batch, *matrices), "N, Hv, K, V", q, "q")
    check_no_overlap(op, state)
    check_states_out(op, states_out, tokens, state, q, "q")


@torch.library.register_fake("inlay::gated_delta_step")
def _(q, k, v, g, beta, state, states_out, scale, l2norm_qk):
    checks.same_device(q, k, v, g, beta, state, states_out)
    return q.new_empty(v.shape)
