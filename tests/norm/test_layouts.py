"""Are strided inputs and gradients read in place and rightly, wherever their rows lie?"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import inlay
from tests.norm.cases import BASIC, check_gradients, check_values
from tests.support.devices import random_like

# Each lays a tensor [2, 5, 3, N] out in another way, as models do. Values are the tensor's own.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "first half of an interleaved [q | gate] projection": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "second half of it": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] :],
    "k of a packed [q, k, v]": lambda t: torch.stack([t, t, t], 2)[:, :, 1],
    "transposed [B, H, S, D]": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every dimension permuted": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "a slice of more tokens": lambda t: torch.cat([t, t], 1)[:, 2 : 2 + t.shape[1]].copy_(t),
    "one element past alignment": lambda t: misaligned(t, 1),
    "three elements past alignment": lambda t: misaligned(t, 3),
    "odd row pitch": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
}


def misaligned(t: Tensor, offset: int) -> Tensor:
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)


def laid_out(tensors: dict[str, Tensor], layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Every tensor of rows in the layout; vectors one element past alignment."""
    return {name: layout(t) if t.dim() > 1 else misaligned(t, 1) for name, t in tensors.items()}


@pytest.mark.parametrize("width", [64, 100, 257])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_layouts(case, layout, width, device):
    tensors = laid_out(case.inputs((2, 5, 3, width), torch.bfloat16, device), layout)
    check_values(case, tensors)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, tuple(layout(dout) for dout in douts))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_inputs_that_lie_differently(case, device):
    tensors = case.inputs((2, 5, 3, 64), torch.float32, device)
    layouts = [LAYOUTS["transposed [B, H, S, D]"], LAYOUTS["odd row pitch"], LAYOUTS["one element past alignment"]]
    tensors = {name: layouts[i % 3](t) if t.dim() > 1 else t for i, (name, t) in enumerate(tensors.items())}
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("shape", [(4, 1, 64), (1, 4, 64)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_expanded_rows(case, shape, device):
    """Stride 0: the same row many times, as in a broadcast query."""
    tensors = case.inputs(shape, torch.float32, device)
    tensors = {name: t.expand(4, 4, 64) if t.dim() > 1 else t for name, t in tensors.items()}
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradient_of_a_sum(case, device):
    """``y.sum()`` has a gradient whose strides are all 0."""
    tensors = case.inputs((3, 4, 64), torch.float32, device)
    ones = tuple(torch.ones((), device=device).expand(output.shape) for output in case.run(inlay, tensors))
    check_gradients(case, tensors, ones)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradient_with_a_strided_last_dimension(case, device):
    tensors = case.inputs((3, 4, 64), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, tuple(dout.transpose(-1, -2).contiguous().transpose(-1, -2) for dout in douts))


def test_gradient_with_four_strides(device):
    case = BASIC[0]
    tensors = case.inputs((2, 3, 4, 5, 32), torch.float32, device)
    (dy,) = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, (dy.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4),))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    order=st.permutations(range(3)),
    width=st.sampled_from([1, 3, 8, 33, 130]),
    case=st.sampled_from(BASIC),
)
def test_any_strides(sizes, gaps, order, width, case, device):
    """Leading dimensions in any order in memory, with gaps between them."""
    torch.manual_seed(0)  # for each example, so that a failure repeats

    def scatter(t: Tensor) -> Tensor:
        dims = [dim for dim in order if dim < len(sizes)]
        strides, pitch = [0] * len(sizes), width + gaps[3]
        for dim in reversed(dims):
            strides[dim] = pitch
            pitch = pitch * sizes[dim] + gaps[dim]
        out = t.new_full((pitch,), torch.nan).as_strided(t.shape, (*strides, 1))
        return out.copy_(t)

    tensors = case.inputs((*sizes, width), torch.float32, device)
    tensors = {name: scatter(t) if t.dim() > 1 else t for name, t in tensors.items()}
    check_values(case, tensors)
    check_gradients(case, tensors, tuple(scatter(dout) for dout in random_like(case.run(inlay, tensors))))


def test_offsets_beyond_32_bits(device):
    """Two rows 2^31 elements apart; on the CPU the memory between them is never touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    x = base.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    tensors = {"x": x, "weight": torch.randn(64, device=device).bfloat16()}
    check_values(BASIC[0], tensors)
    check_gradients(BASIC[0], tensors, (torch.randn(2, 64, device=device).bfloat16(),))


def test_a_huge_stride_on_a_dimension_of_one_row(device):
    x = torch.randn(64, device=device).as_strided((1, 1, 64), (2**40, 2**50, 1))
    check_values(BASIC[0], {"x": x})
