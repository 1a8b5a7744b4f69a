"""Where tests run, in which dtypes, and on what memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from inlay import _load

HALVES = (torch.bfloat16, torch.float16)
_DTYPES = {
    "cpu": (torch.float32, *HALVES, torch.float64),
    "cuda": (torch.float32, *HALVES),
}


def cuda_missing() -> str | None:
    """Why tests marked `cuda` cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    library = _load.cuda_library()
    return None if library.loaded else f"{library.name}: {library.reason}"


def each_dtype(*, halves_only: bool = False) -> pytest.MarkDecorator:
    """Parametrizes `device` and `dtype` over every pair that has kernels."""
    return pytest.mark.parametrize(
        ("device", "dtype"),
        [
            pytest.param(
                device,
                dtype,
                id=f"{device}-{short_name(dtype)}",
                marks=[pytest.mark.cuda] if device == "cuda" else [],
            )
            for device, dtypes in _DTYPES.items()
            for dtype in dtypes
            if dtype in HALVES or not halves_only
        ],
    )


def short_name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}[dtype]


def random_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of outputs, as any."""
    return tuple(torch.randn(output.shape, device=output.device).to(output.dtype) for output in outputs)


def poison_free_memory(device: str, block_bytes: tuple[int, ...], copies: int = 8) -> None:
    """Leaves freed blocks full of NaN behind, so that the next allocations of these sizes start from NaN.

    Deterministic mode's own filling does not reach tensors that C++ code allocates through the stable ABI.
    """
    blocks = [torch.full((max(1, size // 4),), torch.nan, device=device) for size in block_bytes for _ in range(copies)]
    del blocks


def free_cuda_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
