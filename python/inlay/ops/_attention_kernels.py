"""Which cases of attention have native kernels: the one place that says so. All others are the eager reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_HEAD_DIM = 256  # of q and k, and of v, at most


class Features(NamedTuple):
    """What a call asks for beyond q, k and v."""

    has_mask: bool
    has_bias: bool
    has_dropout: bool


def has_kernel(q: Tensor, v: Tensor, features: Features) -> bool:
    if q.device.type != "cuda":
        return True
    if features.has_mask or features.has_bias or features.has_dropout or q.dtype not in _CUDA_DTYPES:
        return False
    return max(q.shape[-1], v.shape[-1]) <= _CUDA_HEAD_DIM and _is_hopper(q.device)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).major == 9
