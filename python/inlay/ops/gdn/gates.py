"""The gates of Gated DeltaNet layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function
from inlay.ops.gdn._checks import wide_dtype

_ops = _load.namespace()
_gdn_gates = _ops.gdn_gates.default
_gdn_gates_bwd = _ops.gdn_gates_bwd.default


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
        TypeError, ValueError: see :mod:`inlay.ops.gdn`.
    """
    try:
        arguments = (a, b, A_log, dt_bias, beta_scale, b.dtype if beta_dtype is None else beta_dtype)
        if checks.needs_grad(a, b, A_log, dt_bias):
            return _GdnGates.apply(*arguments)
        return _gdn_gates(*arguments)
    except Exception:
        _check_gates(a, b, A_log, dt_bias, beta_dtype)
        raise


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


def _check_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_dtype: torch.dtype | None) -> None:
    op = "gdn_gates"
    checks.activations(op, "a", a)
    allowed = (torch.float64,) if a.dtype == torch.float64 else checks.HALVES_AND_FLOAT32
    checks.like(op, "b", b, a, dtypes=allowed, of="a")
    for name, tensor in {"A_log": A_log, "dt_bias": dt_bias}.items():
        checks.given(op, name, tensor)
        checks.vector(op, name, tensor, a, of="a")
    checks.dtype(op, "beta_dtype", b.dtype if beta_dtype is None else beta_dtype, allowed)


@torch.library.register_fake("inlay::gdn_gates")
def _(a, b, A_log, dt_bias, beta_scale, beta_dtype):
    checks.same_device(a, b, A_log, dt_bias)
    return a.new_empty(a.shape, dtype=wide_dtype(a)), a.new_empty(a.shape, dtype=beta_dtype)


@torch.library.register_fake("inlay::gdn_gates_bwd")
def _(dg, dbeta, a, b, A_log, dt_bias, beta_scale, needs_vectors):
    checks.same_device(a, b, A_log, dt_bias, dg, dbeta)
    vectors = (A_log, dt_bias)
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        *(a.new_empty(a.shape[-1:] if needs_vectors else (0,), dtype=vector.dtype) for vector in vectors),
    )
