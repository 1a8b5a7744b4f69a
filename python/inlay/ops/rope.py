"""RMSNorm of queries and keys, head by head, and their rotary position embedding, in one pass.

For each head ``x`` of q and k, with the norm left out where there are no weights:

    m = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
    y = m * cos + partner(m) * sin        in the first ``rotary_dim`` channels, y = m in the others

The channels are rotated in pairs: (i, i + rotary_dim / 2), or with ``interleaved`` (2 i, 2 i + 1). ``partner(m)`` is
each channel's other one, negative for the first of a pair: ``rotate_half`` of transformers.

Rounding to a 16-bit dtype, so that results equal the eager code replaced. ``rounding``, of the norm:

* ``"stepwise"``: the normalised head is cast to q's dtype, its product with the weight is rounded to what type
  promotion gives. Llama's norm: Qwen3, Qwen3-MoE, GLM-4 MoE.
* ``"once"``: one cast, to q's dtype, behind the weight. Gemma 3, Qwen3-Next, Qwen3.5 (with ``weight_offset=1``),
  ``torch.nn.RMSNorm``.

``rotary_rounding``, of the rotation:

* ``"stepwise"``: both products and their sum are rounded to what type promotion gives: to q's dtype where cos and sin
  have it, as in nearly every model of transformers; not before the end where they are float32 (Ernie 4.5, diffusers).
* ``"once"``: the rotation is computed in float32 whatever cos and sin are (Cohere).

What type promotion widens to float32 is rounded to q's dtype at the end.

Sources: https://arxiv.org/abs/2104.09864 (rotary embedding), https://arxiv.org/abs/1910.07467 (RMSNorm),
``apply_rotary_pos_emb`` in transformers' modeling_llama.py, modeling_qwen3.py, modeling_qwen3_next.py (partial),
modeling_glm4.py (interleaved), modeling_gpt_oss.py (one angle for each pair).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function
from inlay.ops._rounding import ROUNDING

_ops = _load.namespace()
_rope = _ops.qk_norm_rope.default
_rope_bwd = _ops.qk_norm_rope_bwd.default


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = "stepwise",
    rotary_rounding: str = "stepwise",
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm (optional) and rotary embedding of queries and keys; the module's docstring has the formula.

    Args:
        q: [B, S, Hq, D] with stride 1 in the last dimension, any strides before: slices of a packed projection, of one
            whose heads hold a query and a gate side by side, and transposed [B, H, S, D] are read in place. float32,
            bfloat16 or float16, on the CPU float64 too.
        k: [B, S, Hk, D], q's dtype.
        cos, sin: [B, S, R], [1, S, R] or [S, R]; q's dtype or float32. R is ``rotary_dim``, an angle for each channel
            as transformers gives them (mRoPE's merged ones too), or half of it, an angle for each pair.
        q_weight, k_weight: [D], any dtype; both, or None for the rotary embedding alone.
        eps: added to the mean square.
        weight_offset: added to the weights in float32; 1.0 where they are zero-centred (Gemma 3, Qwen3-Next, Qwen3.5).
        rounding: ``"stepwise"`` or ``"once"``, see the module's docstring.
        rotary_rounding: ``"stepwise"`` or ``"once"``, likewise.
        rotary_dim: how many channels are rotated, an even number; None: as many as cos has. Others pass (normalised).
        interleaved: which channels are pairs.

    Returns:
        q and k, [B, S, H, D], contiguous, in q's dtype; ``.transpose(1, 2)`` is the view that transformers' attention
        functions take.

    Raises:
        TypeError: for what is not a tensor.
        ValueError: for a wrong dtype, shape, device or stride, naming the argument; for cos or sin that require a
            gradient.

    Differentiable in q, k and the weights. cos and sin get no gradient.
    """
    try:
        arguments = (
            q, k, cos, sin, q_weight, k_weight, cos.shape[-1] if rotary_dim is None else rotary_dim, eps, weight_offset,
            ROUNDING[rounding], ROUNDING[rotary_rounding], interleaved,
        )  # fmt: skip
        if checks.needs_grad(q, k, q_weight, k_weight, cos, sin):
            _without_gradient("cos", cos)
            _without_gradient("sin", sin)
            if q_weight is not None and k_weight is q_weight:  # Dynamo does not trace a function of one tensor twice
                arguments = (*arguments[:5], q_weight.view_as(q_weight), *arguments[6:])
            return _QkNormRope.apply(*arguments)
        return _rope(*arguments)
    except Exception:
        _check(q, k, cos, sin, q_weight, k_weight, rotary_dim)
        checks.choice("qk_norm_rope", "rounding", rounding, ROUNDING)
        checks.choice("qk_norm_rope", "rotary_rounding", rotary_rounding, ROUNDING)
        raise


def _without_gradient(argument: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"qk_norm_rope: {argument} must be without gradient, got one that requires it; call .detach()")


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary_dim: int | None,
) -> None:
    op = "qk_norm_rope"
    checks.activations(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"{op}: q must have shape [B, S, H, D], got {list(q.shape)}")
    batch, tokens, _, width = q.shape
    checks.given(op, "k", k)
    checks.on_device(op, "k", k, q, "q")
    checks.dtype(op, "k", k.dtype, (q.dtype,))
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, tokens, width):
        raise ValueError(f"{op}: k must have shape [{batch}, {tokens}, H, {width}] as q has, got {list(k.shape)}")
    checks.activations(op, "k", k)
    checks.given(op, "cos", cos)
    rotary = cos.shape[-1] if rotary_dim is None and cos.dim() else rotary_dim
    if not isinstance(rotary, int) or not 0 <= rotary <= width or rotary % 2:
        raise ValueError(f"{op}: rotary_dim must be an even number up to q's width {width}, got {rotary}")
    halves = q.dtype in (torch.bfloat16, torch.float16)
    _check_angles("cos", cos, q, (q.dtype, torch.float32) if halves else (q.dtype,), (rotary, rotary // 2))
    _check_angles("sin", sin, q, (cos.dtype,), (cos.shape[-1],))
    if (q_weight is None) != (k_weight is None):
        given = "None" if k_weight is None else "a tensor"
        raise ValueError(f"{op}: k_weight must be given exactly when q_weight is, got {given}")
    checks.vector(op, "q_weight", q_weight, q, "q")
    checks.vector(op, "k_weight", k_weight, k, "k")


def _check_angles(
    argument: str, angles: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...], columns: tuple[int, ...]
) -> None:
    op = "qk_norm_rope"
    checks.given(op, argument, angles)
    checks.on_device(op, argument, angles, q, "q")
    checks.dtype(op, argument, angles.dtype, dtypes)
    batch, tokens = q.shape[:2]
    leading = tuple(angles.shape[:-1])
    if leading not in ((batch, tokens), (1, tokens), (tokens,)) or angles.shape[-1] not in columns:
        shape = f"[{batch} or 1, {tokens}, {' or '.join(map(str, columns))}]"
        raise ValueError(f"{op}: {argument} must have shape {shape}, the first size optional, got {list(angles.shape)}")
    checks.activations(op, argument, angles)


class _QkNormRope(Function):
    """Saves the inputs alone: a head's root mean square is worked out again while its gradient is read."""

    @staticmethod
    def forward(  # type: ignore[override]
        q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, rounding, rotary_rounding, interleaved
    ):
        return _rope(
            q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, rounding, rotary_rounding, interleaved
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, _, _, interleaved = inputs
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.constants = rotary_dim, eps, weight_offset, interleaved

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor):  # type: ignore[override]
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        needs_q, needs_k, _, _, needs_q_weight, needs_k_weight, *_ = ctx.needs_input_grad
        dq, dk, dq_weight, dk_weight = _rope_bwd(
            checks.dense_gradient(dq_out), checks.dense_gradient(dk_out), q, k, cos, sin, q_weight, k_weight,
            *ctx.constants, needs_q_weight, needs_k_weight,
        )  # fmt: skip
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            None,
            None,
            dq_weight if needs_q_weight else None,
            dk_weight if needs_k_weight else None,
            *[None] * 6,
        )


@torch.library.register_fake("inlay::qk_norm_rope")
def _(q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, rounding, rotary_rounding, interleaved):
    checks.same_device(q, k, cos, sin, q_weight, k_weight)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("inlay::qk_norm_rope_bwd")
def _(
    dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, interleaved, needs_dq_weight,
    needs_dk_weight,
):  # fmt: skip
    checks.same_device(q, dq_out, dk_out, k, cos, sin, q_weight, k_weight)
    dq_weight = torch.empty_like(q_weight) if needs_dq_weight else q.new_empty((0,))
    dk_weight = torch.empty_like(k_weight) if needs_dk_weight else q.new_empty((0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight
