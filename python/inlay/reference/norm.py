"""The norm family in eager PyTorch. See ``inlay.ops.norm`` for what each argument means."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    rounding: str = "once",
) -> Tensor:
    wide = _widen(x)
    mean_square = wide.square().mean(-1, keepdim=True)
    normalised = wide * torch.rsqrt(mean_square + default_eps(x.dtype, eps))
    y = _scale_and_shift(normalised, weight, bias, weight_offset, rounding, x.dtype)
    return y if rounding == "stepwise" else y.to(x.dtype)


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
    residual_out = (_widen(x) + _widen(residual)).to(residual_dtype or residual.dtype)
    wide = _widen(residual_out)
    mean_square = wide.square().mean(-1, keepdim=True)
    normalised = wide * torch.rsqrt(mean_square + default_eps(x.dtype, eps))
    y = _scale_and_shift(normalised, weight, bias, weight_offset, rounding, x.dtype)
    return (y if rounding == "stepwise" else y.to(x.dtype)), residual_out


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
    wide_gate = _widen(gate)
    activated = wide_gate * torch.sigmoid(wide_gate) if activation == "silu" else torch.sigmoid(wide_gate)
    wide = _widen(x)
    if not norm_before_gate:
        wide = wide * activated
    mean_square = wide.square().mean(-1, keepdim=True)
    normalised = wide * torch.rsqrt(mean_square + default_eps(x.dtype, eps))
    y = _scale_and_shift(normalised, weight, bias, weight_offset, rounding, x.dtype)
    return (y * activated if norm_before_gate else y).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    wide = _widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return _scale_and_shift(normalised, weight, bias, 0.0, "once", x.dtype).to(x.dtype)


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def default_eps(dtype: torch.dtype, eps: float | None) -> float:
    """``eps``, or what ``torch.nn.RMSNorm`` takes for None: the machine epsilon of the dtype computed in."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _scale_and_shift(
    normalised: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    rounding: str,
    dtype: torch.dtype,
) -> Tensor:
    """``normalised * (weight + weight_offset) + bias``; "stepwise" rounds after every step, "once" leaves it wide."""
    stepwise = rounding == "stepwise"
    y = normalised.to(dtype) if stepwise else normalised
    if weight is not None:
        product = _widen(y) * (_widen(weight) + weight_offset)
        y = product.to(torch.promote_types(y.dtype, weight.dtype)) if stepwise else product
    if bias is not None:
        total = _widen(y) + _widen(bias)
        y = total.to(torch.promote_types(y.dtype, bias.dtype)) if stepwise else total
    return y
