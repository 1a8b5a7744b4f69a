"""Loads the native libraries and says what was loaded. Nothing here needs a GPU or a compiler."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_LIB = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class Library:
    """A native library: loaded, or the reason why not."""

    name: str
    loaded: bool
    reason: str = ""


@cache
def cpu_library() -> Library:
    """Schemas and CPU kernels. Without it there are no ops at all, so its absence raises ImportError."""
    path = _LIB / "libinlay.so"
    if not path.is_file():
        raise ImportError(
            f"inlay: native library {path.name} is missing from {path.parent}; run `make setup` or reinstall"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"inlay: {path.name} does not load with torch {torch.__version__} (it needs torch 2.11 or later): {error}"
        ) from error
    return Library(path.name, True)


@cache
def cuda_library() -> Library:
    """CUDA kernels, loaded only when this torch was built with CUDA. Never raises: CPU ops go on working."""
    path = _LIB / "libinlay_cuda.so"
    if not path.is_file():
        return Library(path.name, False, "not built: nvcc was not found when inlay was installed")
    if torch.version.cuda is None:
        return Library(path.name, False, f"torch {torch.__version__} is a CPU build")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(
            path.name, False, f"does not load with torch {torch.__version__}, CUDA {torch.version.cuda}: {error}"
        )
    return Library(path.name, True)


def namespace():
    """``torch.ops.inlay`` with every library loaded that can be."""
    cpu_library()
    cuda_library()
    return torch.ops.inlay
