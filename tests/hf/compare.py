"""Comparisons of a patched model's results with an unpatched one's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_same_rounding(actual: Tensor, expected: Tensor, what: str) -> None:
    """A norm's result: in 16 bits at least 99.9 % of the values are equal bit for bit, the rest hardly differ.

    A unit in the last place of the normalised row can become two, once it is multiplied with the weight.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - expected.double()).abs()
    if actual.dtype in (torch.bfloat16, torch.float16):
        same = (actual == expected).double().mean().item()
        assert same >= 0.999, f"{what}: only {same:.2%} of the values are equal"
        assert (error <= 2 * eps * expected.double().abs() + torch.finfo(actual.dtype).tiny).all(), what
    else:
        assert (error <= 16 * eps * expected.double().abs().amax(-1, keepdim=True)).all(), what


def assert_same_values(actual: Tensor, expected: Tensor, what: str, computed_in: torch.dtype | None = None) -> None:
    """A whole model's result: rounding errors of its norms, spread by everything after them.

    A norm that is wrong by 1 % fails this in any dtype. ``computed_in`` is for results that were cast up afterwards.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    eps = torch.finfo(computed_in or actual.dtype).eps
    # In 16 bits attention rounds where the model's own does not, and the other way round.
    factor = 48 if eps < 1e-4 else 1.2
    want, error = expected.double(), (actual.double() - expected.double()).abs()
    assert error.norm() <= factor * eps * want.norm(), f"{what}: {error.norm() / want.norm():.2e}"
    assert error.max() <= (2 if eps > 1e-4 else 96) * eps * want.abs().max(), (
        f"{what}: {error.max() / want.abs().max():.2e}"
    )


def gradients(model: nn.Module, ids: Tensor, **arguments: object) -> dict[str, Tensor]:
    """Every parameter's gradient of the language-modelling loss, in float64."""
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, **arguments).loss.backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 distance, parameter by parameter."""
    assert actual.keys() == expected.keys()
    return {name: ((actual[name] - want).norm() / (want.norm() + 1e-12)).item() for name, want in expected.items()}
