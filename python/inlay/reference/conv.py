"""The conv family in eager PyTorch. See ``inlay.ops.conv`` for what each argument means."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        sequences = [x]
        states = [initial_state]
    else:
        boundaries = cu_seqlens.tolist()
        sequences = [x[:, begin:end] for begin, end in pairwise(boundaries)]
        states = [None] * len(sequences) if initial_state is None else list(initial_state.split(1))
    results = [_convolve(*pair, weight, bias, activation) for pair in zip(sequences, states, strict=True)]
    y = torch.cat([y for y, _ in results], dim=1)
    if not return_final_state:
        return y
    return y, torch.cat([state for _, state in results])


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    slots = torch.arange(x.shape[0], device=x.device) if state_indices is None else state_indices.long()
    is_slot = (slots >= 0) & (slots < state.shape[0])
    rows, slots = is_slot.nonzero().squeeze(1), slots[is_slot]
    tokens = x.unsqueeze(1) if x.dim() == 2 else x
    width, length = weight.shape[-1], state.shape[-1]
    old = state[slots]
    y = torch.zeros_like(tokens)
    y[rows], _ = _convolve(tokens[rows], old[..., length - (width - 1) :], weight, bias, activation)
    state[slots] = torch.cat([old, tokens[rows].transpose(1, 2)], dim=-1)[..., -length:]
    return y.view(x.shape)


def _convolve(
    x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """One sequence a batch row; returns y and the final state."""
    width = weight.shape[-1]
    taps = _widen(weight.reshape(-1, width))
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state.transpose(1, 2)
    inputs = torch.cat([before, x], dim=1)
    y = torch.zeros_like(x, dtype=taps.dtype)
    for k in range(width):
        y = y + _widen(inputs[:, k : k + x.shape[1]]) * taps[:, k]
    if bias is not None:
        y = y + _widen(bias)
    y = y.to(torch.promote_types(x.dtype, weight.dtype))
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, x.shape[1] :].transpose(1, 2)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
