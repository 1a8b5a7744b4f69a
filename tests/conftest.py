"""Fixtures and settings shared by every test. Tests marked `cuda` are skipped where they cannot run, saying why."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.devices import cuda_missing

hypothesis.settings.register_profile(
    "inlay",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("inlay")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda_missing()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The same test on every device."""
    return request.param


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graph is left from another test, and none for the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
