"""Are rows the choices of all tokens, sorted by their experts and within one by slot, however many there are?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inlay
from tests.moe.cases import Case, gradients
from tests.support.compare import assert_same_bits

# Tokens, slots, experts: few choices and many, more experts than any router has, and none of each.
SIZES = [
    *((1, 8, 128), (7, 3, 1), (1000, 8, 128), (1100, 8, 64), (9000, 1, 1), (3000, 10, 300), (20_000, 8, 128)),
    *((300, 2, 1100), (4500, 2, 1030), (5, 0, 3), (0, 2, 3)),
]  # fmt: skip


def _rows(experts: int, *, indices: Tensor | None = None, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    given = ends if indices is None else indices
    assert given is not None
    tokens = 50 if indices is None else indices.shape[0]
    x = torch.ones(tokens, 1, device=given.device)
    up, down = torch.ones(experts, 2, 1, device=given.device), torch.ones(experts, 1, 1, device=given.device)
    _, _, rows, found = torch.ops.inlay.moe_experts_fwd(
        x, indices, None, ends, up, down, None, None, None, None, 0, True, False, False, torch.inf, False
    )
    return rows, found


def _check(rows: Tensor, ends: Tensor, indices: Tensor, experts: int) -> None:
    order = indices.flatten().long().sort(stable=True)[1]
    assert torch.equal(rows.long(), order)
    assert torch.equal(ends.long(), indices.flatten().long().bincount(minlength=experts + 1)[:experts].cumsum(0))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_a_stable_sort(size, integers, device):
    tokens, slots, experts = size
    skewed = (torch.rand(tokens, slots, device=device) ** 3 * (experts + 1)).to(integers)  # some of no expert
    everybody = torch.full((tokens, slots), experts - 1, dtype=integers, device=device)
    for indices in (skewed, torch.randint(experts, (tokens, slots), dtype=integers, device=device), everybody):
        _check(*_rows(experts, indices=indices), indices, experts)


@pytest.mark.parametrize("experts", [1, 6, 1500])
def test_rows_that_came_sorted(experts, device):
    ends = torch.randint(51, (experts,), device=device).sort()[0]
    rows, found = _rows(experts, ends=ends)
    assert torch.equal(rows.long(), torch.arange(50, device=device))
    assert torch.equal(found.long(), ends)


@pytest.mark.cuda
def test_values_that_the_device_cannot_report():
    """Others than experts count as none; ends are held to what they may be. The CPU raises."""
    case = Case(tokens=200, slots=3, biases=True)
    tensors = case.inputs(torch.float32, "cuda")
    wild = torch.tensor([-1, -(2**40), case.experts + 1, 2**40], device="cuda")
    outside = torch.rand(200, 3, device="cuda") < 0.3
    indices = torch.where(outside, wild[torch.randint(4, (200, 3), device="cuda")], tensors["indices"])
    none = torch.where(outside, case.experts, tensors["indices"])
    dy = torch.randn_like(tensors["x"])
    expected = gradients(case, inlay, {**tensors, "indices": none}, dy)
    for name, gradient in gradients(case, inlay, {**tensors, "indices": indices}, dy).items():
        assert_same_bits(gradient, expected[name], f"d{name}")
    ends = torch.tensor([-7, 20, 10, 2**40, 30, 200], device="cuda")
    rows, found = _rows(6, ends=ends)
    assert found.tolist() == [0, 20, 20, 50, 50, 50]
    assert torch.equal(rows.long(), torch.arange(50, device="cuda"))
