from __future__ import annotations

import torch

from tests.support.devices import poison_free_memory


def test_poison_reaches_the_next_allocation(device):
    poison_free_memory(device, (64 * 1024,))
    assert torch.empty(64 * 1024 // 4, device=device).isnan().any()
