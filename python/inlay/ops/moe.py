"""Sparse mixture of experts: the router, and the experts.

The router, per token with logits z [E], in float32 (float64 for float64 logits):

    s = softmax(z), or sigmoid(z)
    I = the k experts with the largest s + bias (z + bias with softmax_after_topk), of equal ones the lower index
    w = s[I], divided by (sum of s[I] + 1e-20) where renormalize; or softmax(z[I]);   then times scaling

With groups (g, c), experts are chosen from the c of g groups whose two largest s + bias have the largest sums.

The experts, with [gate, up] the halves (or, interleaved, the even and odd columns) of the first projection:

    y_t = sum over slots k of w_tk (down_e a(gate_up_e x_t + gate_up_bias_e) + down_bias_e),   e = I_tk
          + sigmoid(shared_gate_t) shared_t
    a   = activation(gate) * up;   for "gpt_oss" gate * sigmoid(1.702 gate) * (up + 1);   ungated activation(h)

where ``limit`` holds gate at most at it, and up within plus and minus it, before that.

Sources: Mixtral https://arxiv.org/abs/2401.04088, DeepSeek-V3 https://arxiv.org/abs/2412.19437 (groups, the bias that
only chooses), transformers' ``integrations/moe.py`` and its models gpt-oss, Qwen2-MoE to Qwen3.5-MoE (the shared expert
and its gate); the order of the backward, which needs no expert's output: SonicMoE https://arxiv.org/abs/2512.14080.

Shapes: logits [T, E], x and y [T, H], indices and weights [T, K]. ``gate_up_proj`` is [E, 2 I, H] and ``down_proj``
[E, H, I] as transformers has them; with ``transposed`` [E, H, 2 I] and [E, I, H], as in gpt-oss; ungated I instead of
2 I. They are read in place, whatever their other strides, and never packed or changed.

Dtypes: x and the projections alike float32, bfloat16 or float16 (float64 on the CPU); weights, biases and shared_gate
x's or float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay import _load, reference
from inlay.ops import _checks as checks
from inlay.ops import _moe_kernels as kernels
from inlay.ops._autograd import Function
from inlay.ops._moe_checks import (
    ACTIVATIONS,
    SCORING,
    SOFTMAX_OF_CHOSEN,
    check_experts,
    check_num_experts,
    check_router,
)
from inlay.reference.moe import RouterStats

_ops = _load.namespace()
_moe_router = _ops.moe_router.default
_moe_router_bwd = _ops.moe_router_bwd.default
_moe_experts = _ops.moe_experts.default
_moe_experts_fwd = _ops.moe_experts_fwd.default
_moe_experts_bwd = _ops.moe_experts_bwd.default


def moe_router(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    renormalize: bool = False,
    groups: tuple[int, int] | None = None,
    scaling: float = 1.0,
    softmax_after_topk: bool = False,
    forced_indices: Tensor | None = None,
    mask: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RouterStats]:
    """Chooses experts for each token, see the module's docstring for the formula.

    Args:
        logits: [T, E], E up to 1024.
        k: experts a token, up to 32.
        scoring: "softmax" or "sigmoid".
        bias: [E], added to what experts are chosen by, and to nothing else; it gets no gradient.
        renormalize: whether weights add up to ``scaling``.
        groups: how many groups the experts fall into, and how many of them are chosen; None is no groups.
        scaling: of the weights.
        softmax_after_topk: choose by the logits, and take the softmax of those chosen.
        forced_indices: [T, K] int32 or int64: the experts, chosen elsewhere (replayed); weights are of these.
        mask: [T] bool: which tokens the counts and the mean of ``stats`` are over; None is all.
        weights_dtype: of the weights, rounded once; None is float32, or float64 for float64 logits.
        stats: whether to return statistics as well, from the same pass.

    Returns:
        weights: [T, K]; indices: [T, K] int64, the highest score first; with ``stats`` also a
        :class:`inlay.RouterStats`.

    Differentiable in logits, from the gradients of weights, ``stats.mean_probabilities`` and ``stats.logsumexp``.

    Raises:
        TypeError: for a non-tensor, or an option of another type.
        ValueError: for a wrong dtype, shape, device or value, naming the argument. ``forced_indices`` are looked at on
            the CPU alone: elsewhere that would wait for the device.
    """
    try:
        if not kernels.has_kernel(logits):
            check_router(
                logits, k, scoring, bias, groups, scaling, softmax_after_topk, forced_indices, mask, weights_dtype
            )
            return reference.moe_router(
                logits, k, scoring=scoring, bias=bias, renormalize=renormalize, groups=groups, scaling=scaling,
                softmax_after_topk=softmax_after_topk, forced_indices=forced_indices, mask=mask,
                weights_dtype=weights_dtype, stats=stats,
            )  # fmt: skip
        if softmax_after_topk and scoring != "softmax":
            raise ValueError("moe_router: scoring must be 'softmax' with softmax_after_topk")
        if groups is not None and forced_indices is not None:
            raise ValueError("moe_router: groups must be None with forced_indices")
        code = SOFTMAX_OF_CHOSEN if softmax_after_topk else SCORING[scoring]
        count, chosen = (1, 1) if groups is None else groups
        dtype = _wide_dtype(logits) if weights_dtype is None else weights_dtype
        arguments = (
            _dense(logits), None if bias is None else bias.detach(),
            None if forced_indices is None else forced_indices.contiguous(),
            None if mask is None else mask.contiguous(), k, code, renormalize, count, chosen, scaling, dtype, stats,
        )  # fmt: skip
        run = _Router.apply if checks.needs_grad(logits) else _moe_router
        weights, indices, counts, mean, logsumexp, measures = run(*arguments)
    except Exception:
        check_router(logits, k, scoring, bias, groups, scaling, softmax_after_topk, forced_indices, mask, weights_dtype)
        raise
    if not stats:
        return weights, indices
    return weights, indices, RouterStats(counts, mean, logsumexp, *measures.unbind(0))


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    recompute: bool = False,
    num_experts: int | None = None,
) -> Tensor:
    """What each token's experts make of it, weighted and added up; see the module's docstring for the formula.

    Args:
        x: [T, H].
        indices: [T, K] int32 or int64: the experts of each token. ``E`` stands for none, as expert parallelism has it
            for experts of other ranks: such a slot gives nothing, and its weight gets a gradient of zero. An expert
            that a token names twice counts twice.
        weights: [T, K].
        gate_up_proj: the first projection, of both or, ungated, of one.
        down_proj: the second.
        gate_up_bias: [E, 2 I], or ungated [E, I], in the order of the projection's outputs.
        down_bias: [E, H].
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" (its square) or "gpt_oss".
        gated: whether the first projection gives gates as well.
        interleaved: whether gates and what they gate take turns; else all gates come first.
        transposed: whether projections are stored [E, in, out].
        limit: None is none.
        shared: [T, H], what a shared expert gives; added in the same pass.
        shared_gate: [T] or [T, 1], whose sigmoid ``shared`` is multiplied by; None is 1.
        recompute: compute the first projection again in the backward instead of keeping its [T K, 2 I] results.
        num_experts: how many experts there are, if that is to be checked: E, the first dimension of the projections.
            Under expert parallelism that is the number of experts on this rank, which transformers has in the experts'
            ``num_experts``, and so also the index that stands for none; not the number of experts on all ranks.

    Returns:
        y: [T, H] in x's dtype. A token's result does not depend on which others there are.

    Differentiable in every floating-point tensor; what needs no gradient costs none, frozen experts in particular.
    Gradients have the same bits in every run, and those of experts that no token names are zero. For the backward are
    kept x, the first projection's results, and 4 bytes for each token and slot; never a tensor of [T K, H].

    Raises:
        TypeError: for a non-tensor, or an option of another type.
        ValueError: for a wrong dtype, shape, device or value, naming the argument. ``indices`` are looked at on the CPU
            alone: elsewhere that would wait for the device.
    """
    if num_experts is not None:
        check_num_experts("moe_experts", num_experts, gate_up_proj)
    try:
        if not kernels.has_kernel(x):
            check_experts(
                "moe_experts", x, indices, weights, None, gate_up_proj, down_proj, gate_up_bias, down_bias, activation,
                gated, transposed, limit, shared, shared_gate,
            )  # fmt: skip
            return reference.moe_experts(
                x, indices, weights, gate_up_proj, down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias,
                activation=activation, gated=gated, interleaved=interleaved, transposed=transposed, limit=limit,
                shared=shared, shared_gate=shared_gate, recompute=recompute,
            )  # fmt: skip
        if weights.shape != indices.shape:
            raise ValueError("moe_experts: weights must have indices's shape")
        return _experts(
            x, indices.contiguous(), weights, None, gate_up_proj, down_proj, gate_up_bias, down_bias, shared,
            shared_gate, activation, gated, interleaved, transposed, limit, recompute,
        )  # fmt: skip
    except Exception:
        check_experts(
            "moe_experts", x, indices, weights, None, gate_up_proj, down_proj, gate_up_bias, down_bias, activation,
            gated, transposed, limit, shared, shared_gate,
        )  # fmt: skip
        raise


def moe_experts_permuted(
    x: Tensor,
    ends: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    weights: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """:func:`moe_experts` of rows that came sorted by their experts, as from an all-to-all.

    Args:
        x: [N, H], those of the first expert first.
        ends: [E] int32 or int64 on x's device, not decreasing: one past each expert's last row, as ``grouped_mm`` has
            its offsets. Rows beyond the last one (of a buffer for the worst case) have no expert: zero results and
            gradients.
        weights: [N] of the rows, or None: ones.
        others: as of :func:`moe_experts`.

    Returns:
        y: [N, H] in x's dtype, each row where its input was.

    Raises:
        TypeError: for a non-tensor, or an option of another type.
        ValueError: for a wrong dtype, shape, device or value, naming the argument.
    """
    op = "moe_experts_permuted"
    try:
        if not kernels.has_kernel(x):
            check_experts(
                op, x, None, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated,
                transposed, limit, None, None,
            )  # fmt: skip
            return reference.moe_experts_permuted(
                x, ends, gate_up_proj, down_proj, weights=weights, gate_up_bias=gate_up_bias, down_bias=down_bias,
                activation=activation, gated=gated, interleaved=interleaved, transposed=transposed, limit=limit,
                recompute=recompute,
            )  # fmt: skip
        return _experts(
            x, None, weights, ends.contiguous(), gate_up_proj, down_proj, gate_up_bias, down_bias, None, None,
            activation, gated, interleaved, transposed, limit, recompute,
        )  # fmt: skip
    except Exception:
        check_experts(
            op, x, None, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated,
            transposed, limit, None, None,
        )  # fmt: skip
        raise


def _experts(
    x: Tensor, indices: Tensor | None, weights: Tensor | None, ends: Tensor | None, gate_up_proj: Tensor,
    down_proj: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, shared: Tensor | None,
    shared_gate: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
    limit: float | None, recompute: bool,
) -> Tensor:  # fmt: skip
    if shared_gate is not None:
        shared_gate = shared_gate.reshape(-1).contiguous()
    arguments = (
        _dense(x), indices, None if weights is None else weights.contiguous(), ends, gate_up_proj, down_proj,
        gate_up_bias, down_bias, None if shared is None else _dense(shared), shared_gate, ACTIVATIONS[activation],
        gated, interleaved, transposed, torch.inf if limit is None else limit,
    )  # fmt: skip
    if not checks.needs_grad(
        x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate
    ):  # fmt: skip
        return _moe_experts(*arguments)
    wants_h = not recompute and checks.needs_grad(x, weights, gate_up_proj, down_proj, gate_up_bias)
    return _Experts.apply(*arguments, wants_h)[0]


class _Router(Function):
    """Saves the logits and the choice: scores are computed again in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        logits, bias, forced, mask, k, scoring, renormalize, groups, chosen_groups, scaling, weights_dtype, stats,
    ):  # fmt: skip
        return _moe_router(
            logits, bias, forced, mask, k, scoring, renormalize, groups, chosen_groups, scaling, weights_dtype, stats
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, indices, counts, mean, logsumexp, measures = output
        ctx.save_for_backward(inputs[0], indices, counts, inputs[3])
        ctx.constants = *inputs[4:7], inputs[9]
        ctx.stats = inputs[11]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, counts, measures, *(() if ctx.stats else (mean, logsumexp)))

    @staticmethod
    def backward(ctx: Any, dweights, _dindices, _dcounts, dmean, dlogsumexp, _dmeasures):  # type: ignore[override]
        if not ctx.stats:  # a traced graph hands over gradients in their place
            dmean = dlogsumexp = None
        if dweights is None and dmean is None and dlogsumexp is None:
            return (None,) * 12
        dweights = None if dweights is None else _dense(dweights)
        dmean, dlogsumexp = (None if d is None else d.contiguous() for d in (dmean, dlogsumexp))
        logits, indices, counts, mask = ctx.saved_tensors
        dlogits = _moe_router_bwd(dweights, dmean, dlogsumexp, logits, indices, counts, mask, *ctx.constants)
        return dlogits, *(None,) * 11


class _Experts(Function):
    """Saves x, the first projection's results and the rows, and of these only what the wanted gradients need."""

    @staticmethod
    def forward(  # type: ignore[override]
        x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate, activation,
        gated, interleaved, transposed, limit, wants_h,
    ):  # fmt: skip
        return _moe_experts_fwd(
            x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate,
            activation, gated, interleaved, transposed, limit, wants_h,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, indices, weights, _, gate_up_proj, down_proj, *rest = inputs[:10]
        _, h, rows, ends = output
        ctx.has_h = inputs[15]
        needs_x = not ctx.has_h or ctx.needs_input_grad[4]
        ctx.save_for_backward(
            x if needs_x else None, h if ctx.has_h else None, rows, ends, weights, gate_up_proj, down_proj, *rest
        )
        ctx.constants = 1 if indices is None else indices.shape[1], *inputs[10:15]
        ctx.weights_shape = None if weights is None else weights.shape
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h, rows, ends)

    @staticmethod
    def backward(ctx: Any, dy, _dh, _drows, _dends):  # type: ignore[override]
        if dy is None:
            return (None,) * 16
        x, h, rows, ends, *saved = ctx.saved_tensors
        dy = _dense(dy)
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 4, 5, 6, 7, 8, 9)]
        results = _moe_experts_bwd(dy, dy if x is None else x, h, rows, ends, *saved, *ctx.constants, *needed)
        dx, dweights, *others = (grad if need else None for grad, need in zip(results, needed, strict=True))
        if dweights is not None:
            dweights = dweights.view(ctx.weights_shape)
        return dx, None, dweights, None, *others, *(None,) * 6


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("inlay::moe_router")
def _(
    logits, bias, forced, mask, k, scoring, renormalize, groups, chosen_groups, scaling, weights_dtype, stats,
):  # fmt: skip
    checks.same_device(logits, bias, forced, mask)
    tokens, experts = logits.shape
    wide = _wide_dtype(logits)

    def statistic(*shape: Any, dtype: torch.dtype = wide) -> Tensor:
        return logits.new_empty(shape if stats else (*shape[:-1], 0), dtype=dtype)

    return (
        logits.new_empty((tokens, k), dtype=weights_dtype), logits.new_empty((tokens, k), dtype=torch.int64),
        statistic(experts, dtype=torch.int64), statistic(experts), statistic(tokens),
        statistic(3, tokens) if stats else statistic(0),
    )  # fmt: skip


@torch.library.register_fake("inlay::moe_router_bwd")
def _(dweights, dmean, dlogsumexp, logits, indices, counts, mask, *_constants):
    checks.same_device(logits, dweights, dmean, dlogsumexp, indices, counts, mask)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("inlay::moe_experts")
def _(
    x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate, *_constants,
):  # fmt: skip
    checks.same_device(x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate)
    return x.new_empty(x.shape)


@torch.library.register_fake("inlay::moe_experts_fwd")
def _(
    x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate, activation,
    gated, interleaved, transposed, limit, wants_h,
):  # fmt: skip
    checks.same_device(x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate)
    rows = x.shape[0] * (1 if indices is None else indices.shape[1])
    h = (rows, gate_up_proj.shape[2 if transposed else 1]) if wants_h else (0,)
    integers = (x.new_empty((size,), dtype=torch.int32) for size in (rows, gate_up_proj.shape[0]))
    return x.new_empty(x.shape), x.new_empty(h), *integers


@torch.library.register_fake("inlay::moe_experts_bwd")
def _(
    dy, x, h, rows, ends, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate, slots,
    activation, gated, interleaved, transposed, limit, *needed,
):  # fmt: skip
    checks.same_device(
        x, dy, h, rows, ends, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate
    )
    inputs = (x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared, shared_gate)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    shapes[1] = (x.shape[0], slots)
    return tuple(
        x.new_empty(shape, dtype=tensor.dtype) if need else x.new_empty((0,), dtype=_dtype_or(tensor, x))
        for tensor, shape, need in zip(inputs, shapes, needed, strict=True)
    )


def _dtype_or(tensor: Tensor | None, x: Tensor) -> torch.dtype:
    return (x if tensor is None else tensor).dtype
