"""The judges themselves: each must accept what it says it accepts and refuse the rest, showing where."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import (
    assert_matches_eager,
    assert_same_bits,
    assert_within_budget,
    ulp_distance,
)


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(8, 512, dtype=torch.float64)


def nudged(x: torch.Tensor, index: int, ulps: int = 1) -> torch.Tensor:
    y = x.clone().flatten()
    y.view(torch.int16)[index] += ulps
    return y.view_as(x)


def test_budget_accepts_eager_itself_and_a_better_result(exact):
    eager = exact.to(torch.bfloat16)
    assert_within_budget(eager, eager, exact, "y")
    assert_within_budget(eager.float(), eager.float(), exact, "y")


def test_budget_accepts_correct_rounding_when_eager_is_exact():
    exact = torch.tensor([1.0, 1.0 + 2**-9], dtype=torch.float64)
    assert_within_budget(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), exact, "y")


def test_budget_allows_the_rounding_of_terms_that_cancel():
    exact = torch.full((4,), 1e-9, dtype=torch.float64)
    eager = exact.float()
    assert_within_budget(eager + 1e-7, eager, exact, "dx", terms=1.0)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(eager + 1e-6, eager, exact, "dx", terms=1.0)


def test_budget_refuses_one_outlier_and_shows_it(exact):
    eager = exact.to(torch.bfloat16)
    actual = eager.clone()
    actual[3, 17] += 0.5
    with pytest.raises(AssertionError, match=r"y: error 0\.\d+ is over the budget .* at \[3, 17\]: got .* exact"):
        assert_within_budget(actual, eager, exact, "y")


def test_budget_refuses_a_bias_too_small_for_the_maximum(exact):
    eager = exact.float()
    eager[0, 0] += 1e-3  # one bad value raises the elementwise budget, not the aggregate one
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_within_budget(exact.float() + 1e-4, eager, exact, "y")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_budget_refuses_a_non_finite_value_that_eager_lacks_and_the_reverse(exact, value):
    eager = exact.float()
    actual = eager.clone()
    actual[2, 5] = value
    for pair in ((actual, eager), (eager, actual)):
        with pytest.raises(AssertionError, match=r"at \[2, 5\]"):
            assert_within_budget(*pair, exact, "y")
    assert_within_budget(actual, actual, exact, "y")


def test_budget_accepts_empty_tensors():
    assert_within_budget(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float64), "y")


def test_budget_refuses_another_shape_or_dtype(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(exact[:1].float(), exact.float(), exact, "y")
    with pytest.raises(AssertionError, match=r"torch\.float16, expected torch\.float32"):
        assert_within_budget(exact.half(), exact.float(), exact, "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matching_allows_one_unit_in_a_thousand_values(exact, dtype):
    eager = exact.to(dtype)
    assert_matches_eager(nudged(eager, 100), eager, "y")
    with pytest.raises(AssertionError, match=r"2 units in the last place .* at \[1, 0\]"):
        assert_matches_eager(nudged(eager, 512, ulps=2), eager, "y")
    with pytest.raises(AssertionError, match=r"99\.8\d*% of the values equal eager's, 99\.9"):
        assert_matches_eager(nudged(eager, torch.arange(0, 4096, 819)), eager, "y")


def test_ulp_distance_crosses_zero_and_counts_both_zeros_as_one():
    tiny = 2.0**-24  # the smallest float16 above zero
    a = torch.tensor([0.0, tiny, tiny, 1.0], dtype=torch.float16)
    b = torch.tensor([-0.0, 0.0, -tiny, 1.0009765625], dtype=torch.float16)
    assert ulp_distance(a, b).tolist() == [0, 1, 2, 1]


def test_same_bits_takes_nan_for_nan_and_shows_a_difference():
    x = torch.tensor([1.0, torch.nan, 3.0])
    assert_same_bits(x, x.clone(), "y")
    with pytest.raises(AssertionError, match=r"at \[2\]: got 4\.0, eager 3\.0"):
        assert_same_bits(torch.tensor([1.0, torch.nan, 4.0]), x, "y")
