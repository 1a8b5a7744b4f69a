"""The rope family in eager PyTorch. See ``inlay.ops.rope`` for what each argument means."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.reference.norm import rms_norm


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
    rotary_dim = cos.shape[-1] if rotary_dim is None else rotary_dim
    cos, sin = (_for_each_channel(angles, rotary_dim, interleaved) for angles in (cos, sin))

    def norm_and_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        value = x
        if weight is not None:
            value = rms_norm(x, weight, eps=eps, weight_offset=weight_offset, rounding=rounding)
        rotated, passed = value[..., :rotary_dim], value[..., rotary_dim:]
        if rotary_rounding == "once":
            wide = torch.promote_types(rotated.dtype, torch.float32)
            rotated = rotated.to(wide) * cos.to(wide) + _partners(rotated, interleaved).to(wide) * sin.to(wide)
        else:
            rotated = rotated * cos + _partners(rotated, interleaved) * sin
        return torch.cat([rotated.to(x.dtype), passed.to(x.dtype)], dim=-1)

    return norm_and_rotate(q, q_weight), norm_and_rotate(k, k_weight)


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """For each channel the other one of its pair, negative for the first of a pair."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def _for_each_channel(angles: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """[..., S, 1, rotary_dim], ready to be broadcast over heads."""
    if angles.shape[-1] != rotary_dim:
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
    return angles.unsqueeze(-2)
