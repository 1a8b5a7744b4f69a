"""How results are judged. Tested in test_compare.py.

An op's result is compared with two others: the same maths in float64 ("exact"), and eager PyTorch code in the op's own
dtype ("eager"). The op may be at most twice as far from exact as eager is: the tolerance follows from the dtype, the
width and the inputs, and no constant needs tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FACTOR = 2.0
# Eager may be exact by luck, so a result is always allowed the error of rounding the exact one, half a unit in the last
# place at the largest magnitude. Float32 results show the rounding of each step that a 16-bit result hides: four steps.
# In float64 "exact" has no more digits than the result, and both round throughout long sums.
_FLOOR_ULPS = {torch.bfloat16: 0.5, torch.float16: 0.5, torch.float32: 2.0, torch.float64: 64.0}


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor, what: str, terms: float = 0.0) -> None:
    """Error of ``actual`` against ``exact``: maximum and relative L2 at most twice eager's, plus the floor.

    ``terms`` is the magnitude of terms that may cancel in a value: computed in float32, they leave an error of their
    own size's rounding, however small the value.
    """
    _assert_same_form(actual, eager, what)
    assert exact.shape == actual.shape, f"{what}: shape {list(actual.shape)}, exact {list(exact.shape)}"
    assert_same_non_finite(actual, eager, what)
    if actual.numel() == 0:
        return
    finite = torch.isfinite(actual)
    exact = exact.to(actual.device, torch.float64)
    error = _error(actual, exact, finite)
    eager_error = _error(eager, exact, finite)
    scale = torch.where(finite, exact, 0.0)
    floor = _FLOOR_ULPS[actual.dtype] * torch.finfo(actual.dtype).eps
    cancelled = _FLOOR_ULPS[torch.float32] * torch.finfo(torch.float32).eps * terms

    budget = _FACTOR * eager_error.max().item() + floor * scale.abs().max().item() + cancelled
    worst = int(error.argmax())
    assert error.flatten()[worst].item() <= budget, (
        f"{what}: error {error.flatten()[worst].item():.3g} is over the budget {budget:.3g} "
        f"(eager's largest error {eager_error.max().item():.3g}) {_show(worst, actual, eager, exact)}"
    )
    norm = scale.norm().item()
    budget = _FACTOR * eager_error.norm().item() + floor * norm + cancelled * actual.numel() ** 0.5
    assert error.norm().item() <= budget, (
        f"{what}: relative L2 error {_ratio(error.norm().item(), norm)} is over the budget {_ratio(budget, norm)} "
        f"(eager's {_ratio(eager_error.norm().item(), norm)}); worst {_show(worst, actual, eager, exact)}"
    )


def assert_matches_eager(actual: Tensor, eager: Tensor, what: str, share: float = 0.999, ulps: int | None = 1) -> None:
    """At least ``share`` of the values equal eager's bit for bit, the rest differ by at most ``ulps`` units.

    A value that is rounded again after a multiplication may differ by twice as many units as before it, since units
    grow with the magnitude in steps of two. ``ulps`` None sets no limit, for sums that may cancel.
    """
    _assert_same_form(actual, eager, what)
    assert_same_non_finite(actual, eager, what)
    if actual.numel() == 0:
        return
    distance = torch.where(torch.isfinite(actual), ulp_distance(actual, eager), 0)
    worst = int(distance.argmax())
    assert ulps is None or distance.flatten()[worst].item() <= ulps, (
        f"{what}: {distance.flatten()[worst].item()} units in the last place from eager, at most {ulps} allowed "
        f"{_show(worst, actual, eager)}"
    )
    equal = (distance == 0).double().mean().item()
    assert equal >= share, f"{what}: {equal:.4%} of the values equal eager's, {share:.4%} wanted"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality; NaN equals NaN."""
    _assert_same_form(actual, expected, what)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{what}: differs {_show(int((~same).flatten().int().argmax()), actual, expected)}"


def assert_same_non_finite(actual: Tensor, eager: Tensor, what: str) -> None:
    """NaN, +inf and -inf in the same places."""
    for name, mask in {"NaN": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}.items():
        differs = (mask(actual) != mask(eager)).flatten()
        assert not differs.any(), f"{what}: {name} {_show(int(differs.int().argmax()), actual, eager)}"


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values apart; both zeros are one value."""
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(x: Tensor) -> Tensor:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    value = x.contiguous().view(bits).long()
    magnitude = value & torch.iinfo(bits).max
    return torch.where(value < 0, -magnitude, magnitude)


def _error(result: Tensor, exact: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, (result.double() - exact).abs(), 0.0)


def _assert_same_form(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.device == expected.device, f"{what}: on {actual.device}, expected {expected.device}"


def _show(flat_index: int, actual: Tensor, expected: Tensor, exact: Tensor | None = None) -> str:
    position = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), actual.shape)]
    text = f"at {position}: got {actual.flatten()[flat_index].item()}, eager {expected.flatten()[flat_index].item()}"
    return text if exact is None else f"{text}, exact {exact.flatten()[flat_index].item()}"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3g}" if whole > 0 else f"{part:.3g} (absolute)"
