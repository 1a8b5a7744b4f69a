"""Which cases of the MoE family have native kernels: the one place that says so. All others are the eager reference."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernel(x: Tensor) -> bool:
    """No kernel for CUDA takes float64. The reference waits for the device, but where it is compiled."""
    return x.device.type != "cuda" or x.dtype != torch.float64
