"""Fused attention.

Per sequence, for query i and key j of one head, in float32 (float64 for float64 input):

    s_ij  = scale <q_i, k_j>                                 then softcap tanh(s / softcap), then + bias_ij
    lse_i = log(sum over visible j of exp(s_ij), + exp(sink))
    o_i   = sum over visible j of dropout(exp(s_ij - lse_i)) v_j
    y_i   = o_i sigmoid(gate_i)

A query sees the keys that everything given lets it see: the lengths of its row or packed sequence, ``causal`` and
``window``, ``key_ranges``, ``mask``, and a bias other than -inf. A query that sees none has zero output, an ``lse`` of
-inf (that of its sink, where there are sinks) and zero gradients. The last query of a sequence stands at its last key,
whatever their numbers: ``causal`` and ``window`` are counted from there (aligned to the bottom right).

Scores are never in memory as a matrix: keys pass by in blocks, and blocks that no query of a tile may see, as far as
positions say, cost nothing. Query head h uses key head ``h // (Hq / Hkv)``.

Sources: FlashAttention https://arxiv.org/abs/2205.14135 and https://arxiv.org/abs/2307.08691; softcap: Gemma 2
https://arxiv.org/abs/2408.00118; sinks: ``eager_attention_forward`` of transformers' gpt-oss; the gate: its Qwen3-Next
and Qwen3.5.

Shapes: q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, DV], gate and y [B, Sq, Hq, DV], lse [B, Hq, Sq]. Hq is a
multiple of Hkv; D and DV are multiples of 8 up to 512 and may differ. Tensors may be strided: views of [B, H, S, D]
and slices of a packed projection are read in place; where their last dimension is not dense they are copied. Outputs
are contiguous.

Dtypes: q, k, v and gate alike float32, bfloat16 or float16 (float64 on the CPU); sinks and bias q's or float32; lse
float32. With float64 q everything is float64. On CUDA, float32 products are tf32 only where
``torch.backends.cuda.matmul`` allows that; else each is the sum of three tf32 products, of the values' halves, which is
as accurate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay import _load, reference
from inlay.ops import _attention_kernels as kernels
from inlay.ops import _checks as checks
from inlay.ops._attention_checks import check_attention
from inlay.ops._autograd import Function
from inlay.reference.attention import dropout_seed

_UNLIMITED = -1  # as in csrc/attention/params.h

_ops = _load.namespace()
_attention = _ops.attention.default
_attention_fwd = _ops.attention_fwd.default
_attention_bwd = _ops.attention_bwd.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, see the module's docstring for the formula and for shapes and dtypes.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, DV].
        causal: no keys after the query's own; with a window too, both hold.
        scale: of the scores; None is ``D ** -0.5``.
        window: how many keys before and after the query's own it sees, each from 0, None for all.
        softcap: 0 for none.
        sinks: [Hq], logits that take part in the softmax and have no value.
        gate: [B, Sq, Hq, DV], before its sigmoid.
        mask: bool, broadcast to [B, Hq, Sq, Sk] (leading dimensions may be missing): True where a query sees a key.
        bias: broadcast likewise, added to the scores; -inf hides a key.
        cu_seqlens_q: [N + 1] int32 or int64 on q's device: token offsets of sequences packed into the one batch row
            (B = 1), from 0 to Sq, not decreasing; sequences may be empty. Values are checked on the CPU alone:
            elsewhere that would wait for the device.
        cu_seqlens_k: the same of k and v; None is cu_seqlens_q.
        kv_lengths: [B] int32 or int64 on q's device: how many of the keys of each row there are. What lies behind them
            is not looked at. The alignment of ``causal`` and ``window`` does not depend on them.
        dropout_p: the chance of each probability to be dropped, in steps of 1/65536. Which ones is a function of one
            number drawn from torch's generator of the device, and of the sequence, head, query and key.
        return_lse: whether to return the logarithms of the softmax's denominators as well.
        deterministic: whether gradients have the same bits in every run; None is what
            ``torch.are_deterministic_algorithms_enabled()`` says. On the CPU they always do.
        key_ranges: [B or 1, Sq, 2] int32 on q's device: of each query the first key that it may see and one past the
            last, counted from its sequence's first key; ends beyond the keys are held within. :func:`inlay.key_ranges`
            makes them for prefixes, blocks that see each other, chunks and padding on the left.

    Returns:
        y: [B, Sq, Hq, DV] in q's dtype; with ``return_lse`` also lse: [B, Hq, Sq].

    Differentiable in q, k, v, sinks, gate and bias, from the gradients of y and lse.

    Raises:
        TypeError: for a non-tensor, or an option of another type.
        ValueError: for a wrong dtype, shape, device or value, and for arguments that contradict each other, naming the
            argument.
    """
    try:
        needs_grad = checks.needs_grad(q, k, v, sinks, gate, bias)
        if not kernels.has_kernel(q, v, needs_grad):
            check_attention(
                q, k, v, scale, window, softcap, sinks, gate, mask, bias, cu_seqlens_q, cu_seqlens_k,
                kv_lengths, dropout_p, key_ranges,
            )  # fmt: skip
            return reference.attention(
                q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, gate=gate, mask=mask,
                bias=bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, kv_lengths=kv_lengths,
                dropout_p=dropout_p, return_lse=return_lse, deterministic=deterministic, key_ranges=key_ranges,
            )  # fmt: skip
        left, right = window
        if causal:
            right = 0  # a window after the query's own key has at least that one
        if cu_seqlens_q is None and cu_seqlens_k is not None:
            raise ValueError("attention: cu_seqlens_q must be given with cu_seqlens_k, got None")
        arguments = (
            _dense(q), _dense(k), _dense(v), None if gate is None else _dense(gate), sinks, _four(bias), _four(mask),
            cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, kv_lengths, key_ranges,
            dropout_seed(q.device) if dropout_p > 0 else None,
            q.shape[3] ** -0.5 if scale is None else scale, _limit(left), _limit(right), softcap, dropout_p,
            _allows_tf32(q),
        )  # fmt: skip
        if needs_grad:
            if deterministic is None:
                deterministic = torch.are_deterministic_algorithms_enabled()
            y, lse, _ = _Attention.apply(*arguments, deterministic, return_lse)
        elif return_lse:
            y, lse, _ = _attention_fwd(*arguments, False)
        else:
            return _attention(*arguments)
        return (y, lse) if return_lse else y
    except Exception:
        check_attention(
            q, k, v, scale, window, softcap, sinks, gate, mask, bias, cu_seqlens_q, cu_seqlens_k, kv_lengths,
            dropout_p, key_ranges,
        )  # fmt: skip
        raise


class _Attention(Function):
    """Saves the inputs, the denominators and the result before the gate: scores are recomputed in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed, scale, left,
        right, softcap, dropout_p, allow_tf32, deterministic, return_lse,
    ):  # fmt: skip
        return _attention_fwd(
            q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed, scale,
            left, right, softcap, dropout_p, allow_tf32, gate is not None,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        y, lse, o = output
        ctx.save_for_backward(y if inputs[3] is None else o, lse, *inputs[:12])
        *ctx.constants, ctx.deterministic, return_lse = inputs[12:]
        ctx.returns_lse = return_lse
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((o,) if return_lse else (lse, o)))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlse: Tensor | None, do: Tensor | None):  # type: ignore[override]
        o, lse, *inputs = ctx.saved_tensors
        if not ctx.returns_lse:  # a traced graph hands over a gradient in its place
            dlse = None
        if dy is None and dlse is None:
            return (None,) * 20
        dy = torch.zeros_like(o) if dy is None else _dense(dy)
        dlse = None if dlse is None else dlse.contiguous()
        needs_dbias = ctx.needs_input_grad[5]
        dq, dk, dv, dgate, dsinks, dbias = _attention_bwd(
            dy, dlse, o, lse, *inputs, *ctx.constants, needs_dbias, ctx.deterministic
        )
        needed = ctx.needs_input_grad
        optional = (grad if need else None for grad, need in zip((dgate, dsinks, dbias), needed[3:6], strict=True))
        return dq, dk, dv, *optional, *[None] * 14


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _four(scores: Tensor | None) -> Tensor | None:
    """With leading dimensions of 1 where some are missing."""
    if scores is None or scores.dim() >= 4:
        return scores
    return scores[(None,) * (4 - scores.dim())]


def _limit(keys: int | None) -> int:
    if keys is None:
        return _UNLIMITED
    if keys < 0:
        raise ValueError(f"attention: window must be of numbers from 0, or None, got {keys}")
    return keys


def _allows_tf32(q: Tensor) -> bool:
    return q.dtype == torch.float32 and q.device.type == "cuda" and _tf32_setting()


@torch.compiler.assume_constant_result
def _tf32_setting() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_outputs(q: Tensor, v: Tensor, wants_o: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    shape = (batch, queries, heads, v.shape[3])
    lse = q.new_empty((batch, heads, queries), dtype=_wide_dtype(q))
    return q.new_empty(shape), lse, q.new_empty(shape if wants_o else (0,))


@torch.library.register_fake("inlay::attention")
def _(q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed, *_constants):
    checks.same_device(
        q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed
    )
    return _fake_outputs(q, v, False)[0]


@torch.library.register_fake("inlay::attention_fwd")
def _(
    q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed, scale, left,
    right, softcap, dropout_p, allow_tf32, wants_o,
):  # fmt: skip
    checks.same_device(
        q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed
    )
    return _fake_outputs(q, v, wants_o)


@torch.library.register_fake("inlay::attention_bwd")
def _(
    dout, dlse, o, lse, q, k, v, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges,
    dropout_seed, scale, left, right, softcap, dropout_p, allow_tf32, needs_dbias, deterministic,
):  # fmt: skip
    checks.same_device(
        q, k, v, dout, dlse, o, lse, gate, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges,
        dropout_seed,
    )  # fmt: skip
    dgate = q.new_empty((0,) if gate is None else gate.shape)
    dsinks = q.new_empty((0,)) if sinks is None else sinks.new_empty(sinks.shape)
    dbias = bias.new_empty(bias.shape) if needs_dbias else q.new_empty((0,))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), dgate, dsinks, dbias
