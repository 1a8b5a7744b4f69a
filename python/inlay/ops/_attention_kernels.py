"""Which cases of attention have native kernels: the one place that says so. All others are the eager reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# On CUDA: any widths, masks, biases and dropout, on every GPU from compute capability 8.0 on, but
_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# and for gradients of float32 heads wider than this no GPU whose blocks have less shared memory than that
# (csrc/attention/cuda/general_division.h; 8.6, 8.9 and 12.0 have 99 KiB, 8.0 and 9.0 more than enough).
_WIDE_F32 = 256
_WIDE_F32_GRADIENT_BYTES = 148 * 1024


def has_kernel(q: Tensor, v: Tensor, needs_grad: bool) -> bool:
    if q.device.type != "cuda":
        return True
    if q.dtype not in _CUDA_DTYPES:
        return False
    wide = q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > _WIDE_F32
    return not (wide and needs_grad) or _shared_bytes(q.device) >= _WIDE_F32_GRADIENT_BYTES


@torch.compiler.assume_constant_result
def _shared_bytes(device: torch.device) -> int:
    """What a block may have. The native side looks at the same number."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know the attribute
    return properties.shared_memory_per_block_optin
