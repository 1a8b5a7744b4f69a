from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device(device: str) -> str:
    """The devices with kernels: elsewhere the public functions are the reference, and prove nothing."""
    if device == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("inlay::gated_delta_rule", "CUDA"):
        pytest.skip("the gated delta rule has no CUDA kernels yet")
    return device
