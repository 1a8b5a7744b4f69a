from __future__ import annotations

import pytest
import torch

from inlay.hf.binding import Binding


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _attention_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every case of attention has a CUDA kernel; sdpa then runs, and is counted, which no strict test is about."""
    original = Binding.count_fallback

    def count_fallback(self: Binding, reason: str) -> None:
        strict, self.strict = self.strict, self.strict and not reason.startswith("no kernel for ")
        try:
            original(self, reason)
        finally:
            self.strict = strict

    monkeypatch.setattr(Binding, "count_fallback", count_fallback)
