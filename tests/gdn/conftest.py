from __future__ import annotations

import pytest

from tests.support.devices import has_kernel


@pytest.fixture
def device(request: pytest.FixtureRequest, device: str) -> str:
    """The devices with a kernel for the module's ``OP``: elsewhere the public function is the reference."""
    op = getattr(request.module, "OP", "gated_delta_rule")
    if not has_kernel(op, device):
        pytest.skip(f"{op} has no kernel for {device} yet")
    return device
