"""RMSNorm, residual add + RMSNorm, gated RMSNorm, LayerNorm and L2 normalisation over the last dimension.

All five are one native op with parameters. For a row ``x`` of width N, in float32 (float64 for float64 input):

    m     = mean(x)  for layer_norm, else 0
    rstd  = 1 / sqrt(mean((x - m)^2) + eps)     (l2_norm: sum instead of mean)
    y     = (x - m) * rstd * (weight + weight_offset) + bias

``rounding`` says where values are rounded to a 16-bit dtype, so that a result equals the eager code replaced:

* ``"once"``: everything in float32, one cast at the end, y in x's dtype. Gemma, Qwen3-Next, Qwen3.5, gpt-oss,
  ``torch.nn.RMSNorm``, ``torch.nn.LayerNorm``.
* ``"stepwise"``: the normalised row is cast to x's dtype, and every later step is rounded to the dtype that
  PyTorch's type promotion gives (so float32 weights make a float32 y). Llama, Mistral, Qwen2, Qwen3, HF's gated norm.

Sources: RMSNorm https://arxiv.org/abs/1910.07467, LayerNorm https://arxiv.org/abs/1607.06450, gated RMSNorm
https://arxiv.org/abs/2405.21060 (Mamba-2) and ``Qwen3NextRMSNormGated`` in transformers.

Shapes: any leading dimensions, which need not be contiguous (slices of packed projections are read in place, without
a copy, when the leading dimensions have at most three distinct strides); the last dimension must have stride 1.
Outputs are contiguous. Dtypes: float32, bfloat16, float16 on CPU and CUDA, float64 on the CPU. The vectors ``weight``
and ``bias`` may be of any of these dtypes.

Raises ``TypeError`` for a non-tensor and ``ValueError`` for a wrong dtype, shape, device or stride, naming the
argument.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function
from inlay.ops._rounding import ROUNDING, Rounding
from inlay.reference.norm import default_eps


class Kind(IntEnum):
    """What is subtracted and divided by. Mirrors ``inlay::norm::Kind`` in csrc/norm/params.h."""

    RMS = 0
    LAYER = 1
    L2 = 2


class Activation(IntEnum):
    """Mirrors ``inlay::norm::Activation`` in csrc/norm/params.h."""

    SILU = 0
    SIGMOID = 1


# Plain integers: torch takes 3 us longer to convert the members of an enum.
_RMS, _LAYER, _L2 = (int(kind) for kind in Kind)
_ACTIVATION = {"silu": int(Activation.SILU), "sigmoid": int(Activation.SIGMOID)}

_ops = _load.namespace()
_norm = _ops.norm.default
_norm_fwd = _ops.norm_fwd.default
_norm_bwd = _ops.norm_bwd.default
_add_norm = _ops.add_norm.default
_add_norm_fwd = _ops.add_norm_fwd.default


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    rounding: str = "once",
) -> Tensor:
    """Root-mean-square normalisation: ``x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias``.

    Args:
        x: [..., N].
        weight: [N] or None (ones).
        bias: [N] or None.
        eps: added to the mean square; None is the machine epsilon of the dtype computed in, as in ``torch.nn.RMSNorm``.
        weight_offset: added to the weight in float32; 1.0 for zero-centred weights (Gemma, Qwen3-Next, Qwen3.5).
        rounding: ``"once"`` or ``"stepwise"``, see the module's docstring.

    Returns:
        [..., N], contiguous, in x's dtype (with ``"stepwise"``: promoted with weight's and bias's).

    Differentiable in x, weight and bias.
    """
    try:
        return _normalise(x, weight, bias, None, default_eps(x.dtype, eps), weight_offset, _RMS, ROUNDING[rounding])
    except Exception:
        checks.activations("rms_norm", "x", x)
        checks.vector("rms_norm", "weight", weight, x)
        checks.vector("rms_norm", "bias", bias, x)
        checks.choice("rms_norm", "rounding", rounding, ROUNDING)
        raise


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalisation: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, rounded once.

    Args:
        x: [..., N].
        weight, bias: [N] or None.
        eps: added to the (biased) variance.

    Returns:
        [..., N], contiguous, in x's dtype. Differentiable in x, weight and bias.
    """
    try:
        return _normalise(x, weight, bias, None, eps, 0.0, _LAYER, ROUNDING["once"])
    except Exception:
        checks.activations("layer_norm", "x", x)
        checks.vector("layer_norm", "weight", weight, x)
        checks.vector("layer_norm", "bias", bias, x)
        raise


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """L2 normalisation as in Gated DeltaNet: ``x / sqrt(sum(x^2) + eps)``, rounded once.

    Args:
        x: [..., N].
        eps: added to the sum of squares.

    Returns:
        [..., N], contiguous, in x's dtype. Differentiable in x.
    """
    try:
        return _normalise(x, None, None, None, eps, 0.0, _L2, ROUNDING["once"])
    except Exception:
        checks.activations("l2_norm", "x", x)
        raise


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    rounding: str = "stepwise",
    activation: str = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS normalisation with an output gate: ``rms_norm(x) * act(gate)``, or ``rms_norm(x * act(gate))``.

    Args:
        x: [..., N].
        gate: [..., N], x's shape and dtype; its strides may differ from x's.
        weight, bias, eps, weight_offset: as in :func:`rms_norm`.
        rounding: ``"stepwise"`` (Hugging Face's rounding points: normalise, cast, times weight, cast, times the
            float32 activation, cast) or ``"once"``.
        activation: ``"silu"`` or ``"sigmoid"``, computed in float32.
        norm_before_gate: True gates the normalised row (Qwen3-Next, Qwen3.5), False normalises the gated row (Mamba-2).

    Returns:
        [..., N], contiguous, in x's dtype. Differentiable in x, gate, weight and bias.
    """
    if gate is None:  # the op takes that for a norm without a gate
        raise TypeError("gated_rms_norm: gate must be a Tensor, got NoneType")
    try:
        return _normalise(
            x, weight, bias, gate, default_eps(x.dtype, eps), weight_offset, _RMS, ROUNDING[rounding],
            _ACTIVATION[activation], not norm_before_gate,
        )  # fmt: skip
    except Exception:
        checks.activations("gated_rms_norm", "x", x)
        checks.like("gated_rms_norm", "gate", gate, x, dtypes=(x.dtype,))
        checks.vector("gated_rms_norm", "weight", weight, x)
        checks.vector("gated_rms_norm", "bias", bias, x)
        checks.choice("gated_rms_norm", "rounding", rounding, ROUNDING)
        checks.choice("gated_rms_norm", "activation", activation, _ACTIVATION)
        raise


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    rounding: str = "once",
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMS normalisation in one pass: ``h = x + residual; y = rms_norm(h)``; returns ``(y, h)``.

    h is rounded to ``residual_dtype`` before it is normalised, as ``residual + x`` in eager code is.

    Args:
        x: [..., N].
        residual: [..., N], x's shape; x's dtype or float32 (a float32 residual stream).
        weight, bias, eps, weight_offset, rounding: as in :func:`rms_norm`.
        residual_dtype: dtype of h, x's or float32; None keeps residual's.

    Returns:
        y: [..., N] as :func:`rms_norm` returns it, and h: [..., N] in ``residual_dtype``; both contiguous.

    Differentiable in x, residual, weight and bias; the backward takes the gradients of y and h in one pass.
    """
    try:
        return _add_normalise(
            x, residual, weight, bias, default_eps(x.dtype, eps), weight_offset, _RMS, ROUNDING[rounding],
            residual_dtype or residual.dtype,
        )  # fmt: skip
    except Exception:
        checks.activations("add_rms_norm", "x", x)
        x_or_wide = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
        checks.like("add_rms_norm", "residual", residual, x, dtypes=x_or_wide)
        checks.vector("add_rms_norm", "weight", weight, x)
        checks.vector("add_rms_norm", "bias", bias, x)
        checks.choice("add_rms_norm", "rounding", rounding, ROUNDING)
        checks.dtype("add_rms_norm", "residual_dtype", residual_dtype or residual.dtype, x_or_wide)
        raise


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    weight_offset: float,
    kind: int,
    rounding: int,
    activation: int = _ACTIVATION["silu"],
    gate_first: bool = False,
) -> Tensor:
    arguments = (x, weight, bias, gate, eps, weight_offset, kind, rounding, activation, gate_first)
    if checks.needs_grad(x, weight, bias, gate):
        return _Norm.apply(*arguments)[0]
    return _norm(*arguments)


def _add_normalise(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    kind: int,
    rounding: int,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    arguments = (x, residual, weight, bias, eps, weight_offset, kind, rounding, residual_dtype)
    if checks.needs_grad(x, residual, weight, bias):
        y, residual_out, _ = _AddNorm.apply(*arguments)
        return y, residual_out
    return _add_norm(*arguments)


class _Norm(Function):
    """Saves x, the gate and the rows' statistics; the normalised row is recomputed in the backward."""

    @staticmethod
    def forward(x, weight, bias, gate, eps, weight_offset, kind, rounding, activation, gate_first):  # type: ignore[override]
        return _norm_fwd(x, weight, bias, gate, eps, weight_offset, kind, rounding, activation, gate_first)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, gate, _eps, weight_offset, kind, _rounding, activation, gate_first = inputs
        _, stats = output
        ctx.save_for_backward(x, weight, bias, gate, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # else each backward starts by filling a tensor with zeros for stats
        ctx.constants = weight_offset, kind, activation, gate_first

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None):  # type: ignore[override]
        if dy is None:
            return (None,) * 10
        x, weight, bias, gate, stats = ctx.saved_tensors
        weight_offset, kind, activation, gate_first = ctx.constants
        _, needs_weight, needs_bias, _, *_ = ctx.needs_input_grad
        dx, _, dgate, dweight, dbias = _norm_bwd(
            checks.dense_gradient(dy), None, x, stats, weight, bias, gate, weight_offset, kind, activation, gate_first,
            x.dtype, x.dtype, needs_weight, needs_bias,
        )  # fmt: skip
        return (
            dx,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dgate if gate is not None else None,
            *[None] * 6,
        )


class _AddNorm(Function):
    """Saves the new residual and the rows' statistics; takes both outputs' gradients in one pass."""

    @staticmethod
    def forward(x, residual, weight, bias, eps, weight_offset, kind, rounding, residual_dtype):  # type: ignore[override]
        return _add_norm_fwd(x, residual, weight, bias, eps, weight_offset, kind, rounding, residual_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, residual, weight, bias, _eps, weight_offset, kind, _rounding, _residual_dtype = inputs
        _, residual_out, stats = output
        ctx.save_for_backward(residual_out, weight, bias, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.constants = weight_offset, kind, x.dtype, residual.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None, _: Tensor | None):  # type: ignore[override]
        residual_out, weight, bias, stats = ctx.saved_tensors
        weight_offset, kind, x_dtype, residual_dtype = ctx.constants
        _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if dy is None:
            if dresidual_out is None:
                return (None,) * 9
            return dresidual_out.to(x_dtype), dresidual_out.to(residual_dtype), *[None] * 7
        dy = checks.dense_gradient(dy)
        if dresidual_out is not None:
            dresidual_out = checks.dense_gradient(dresidual_out)
        dx, dresidual, _, dweight, dbias = _norm_bwd(
            dy, dresidual_out, residual_out, stats, weight, bias, None, weight_offset, kind, _ACTIVATION["silu"], False,
            x_dtype, residual_dtype, needs_weight, needs_bias,
        )  # fmt: skip
        return (
            dx,
            dx if residual_dtype == x_dtype else dresidual,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *[None] * 5,
        )


def _result_dtype(x_dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, rounding: int) -> torch.dtype:
    """The dtype of y, see ``rounding`` in the module's docstring."""
    dtype = x_dtype
    if rounding == Rounding.STEPWISE:
        for vector in (weight, bias):
            if vector is not None:
                dtype = torch.promote_types(dtype, vector.dtype)
    return dtype


def _stats_like(x: Tensor, kind: int) -> Tensor:
    """[2, rows] (mean, rstd) for LayerNorm, else [1, rows] (rstd)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((2 if kind == Kind.LAYER else 1, rows), dtype=dtype)


@torch.library.register_fake("inlay::norm")
def _(x, weight, bias, gate, eps, weight_offset, kind, rounding, activation, gate_first):
    checks.same_device(x, weight, bias, gate)
    dtype = x.dtype if gate is not None else _result_dtype(x.dtype, weight, bias, rounding)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("inlay::norm_fwd")
def _(x, weight, bias, gate, eps, weight_offset, kind, rounding, activation, gate_first):
    checks.same_device(x, weight, bias, gate)
    dtype = x.dtype if gate is not None else _result_dtype(x.dtype, weight, bias, rounding)
    return x.new_empty(x.shape, dtype=dtype), _stats_like(x, kind)


@torch.library.register_fake("inlay::add_norm")
def _(x, residual, weight, bias, eps, weight_offset, kind, rounding, residual_dtype):
    checks.same_device(x, residual, weight, bias)
    y = x.new_empty(x.shape, dtype=_result_dtype(x.dtype, weight, bias, rounding))
    return y, x.new_empty(x.shape, dtype=residual_dtype)


@torch.library.register_fake("inlay::add_norm_fwd")
def _(x, residual, weight, bias, eps, weight_offset, kind, rounding, residual_dtype):
    checks.same_device(x, residual, weight, bias)
    y = x.new_empty(x.shape, dtype=_result_dtype(x.dtype, weight, bias, rounding))
    return y, x.new_empty(x.shape, dtype=residual_dtype), _stats_like(x, kind)


@torch.library.register_fake("inlay::norm_bwd")
def _(
    dy, dresidual_out, x, stats, weight, bias, gate, weight_offset, kind, activation, gate_first,
    x_dtype, residual_dtype, needs_dweight, needs_dbias,
):  # fmt: skip
    checks.same_device(x, dy, dresidual_out, stats, weight, bias, gate)
    dx = x.new_empty(x.shape, dtype=x_dtype)
    dresidual = x.new_empty(x.shape if residual_dtype != x_dtype else (0,), dtype=residual_dtype)
    dgate = x.new_empty(x.shape if gate is not None else (0,), dtype=x_dtype)
    dweight = torch.empty_like(weight) if needs_dweight else x.new_empty((0,), dtype=x_dtype)
    dbias = torch.empty_like(bias) if needs_dbias else x.new_empty((0,), dtype=x_dtype)
    return dx, dresidual, dgate, dweight, dbias
