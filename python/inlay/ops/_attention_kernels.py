"""Which cases of attention have native kernels: the one place that says so. All others are the eager reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Head dimensions of q and k, and of v, for which CUDA has kernels.
_CUDA_HEAD_DIMS: frozenset[tuple[int, int]] = frozenset()


class Features(NamedTuple):
    """What a call asks for beyond q, k and v."""

    needs_grad: bool
    has_mask: bool
    has_bias: bool
    has_dropout: bool


def has_kernel(q: Tensor, v: Tensor, features: Features) -> bool:
    if q.device.type != "cuda":
        return True
    return q.dtype in (torch.bfloat16, torch.float16) and (q.shape[-1], v.shape[-1]) in _CUDA_HEAD_DIMS
