"""Are strided inputs, states and gradients read in place and rightly, wherever they lie?"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import inlay
from tests.conv.cases import (
    BASIC,
    CHANNELS_INNERMOST,
    LAYOUTS,
    TOKENS_INNERMOST,
    Case,
    check_gradients,
    check_values,
    gradients,
)
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

FULL = BASIC[0]

# Each lays a tensor [B, T, C] out in another way. Values are the tensor's own.
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "first channels of a wider projection": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "last channels of it": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] :],
    "odd pitch of channels": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "a slice of more tokens": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "batch inside of time": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one element past alignment": lambda t: misaligned(t, 1),
    "three elements past alignment": lambda t: misaligned(t, 3),
    "transposed [B, C, T]": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last tokens of a longer [B, C, T]": lambda t: (
        torch.cat([t, t], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, t.shape[1] :]
    ),
    "[C, B, T]": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "misaligned [B, C, T]": lambda t: misaligned(t.transpose(1, 2).contiguous(), 1).transpose(1, 2),
}


def misaligned(t: Tensor, offset: int) -> Tensor:
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)


@pytest.mark.parametrize("shape", [(2, 35, 64), (3, 64, 33), (2, 72, 40)], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_places(place, shape, device):
    tensors = FULL.inputs(shape, torch.bfloat16, device)
    tensors = {name: misaligned(t, 1) for name, t in tensors.items()} | {"x": place(tensors["x"])}
    check_values(FULL, tensors)
    dy, dfinal_state = random_like(FULL.run(inlay, tensors))
    check_gradients(FULL, tensors, (place(dy), dfinal_state))


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_orders_give_the_same_bits(width, dtype, device):
    case = Case(width=width, bias=True, initial_state=True, final_state=True)
    tensors = case.inputs((2, 136, 72), dtype, device)
    douts = random_like(case.run(inlay, tensors))
    results, grads = case.run(inlay, tensors), gradients(case, inlay, tensors, douts)
    tensors["x"] = PLACES["transposed [B, C, T]"](tensors["x"])
    for actual, expected in zip(case.run(inlay, tensors), results, strict=True):
        assert_same_bits(actual, expected, "output")
    for name, gradient in gradients(case, inlay, tensors, douts).items():
        if name in ("x", "initial_state"):  # sums over tokens run in another order
            assert_same_bits(gradient, grads[name], f"d{name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_states(layout, device):
    """The last columns of a cache, and states with the channels innermost."""
    case = Case(initial_state=True, final_state=True, layout=layout)
    tensors = case.inputs((2, 9, 24), torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    state = tensors["initial_state"]
    for strided in (torch.cat([state, state], -1)[..., 3:], state.transpose(1, 2).contiguous().transpose(1, 2)):
        for actual, wanted in zip(case.run(inlay, {**tensors, "initial_state": strided}), expected, strict=True):
            assert_same_bits(actual, wanted, "output")
    douts = random_like(expected)
    douts = (douts[0], douts[1].transpose(1, 2).contiguous().transpose(1, 2))
    check_gradients(case, tensors, douts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_a_sum(layout, device):
    """``y.sum()`` has a gradient whose strides are all 0."""
    case = Case(bias=True, final_state=True, initial_state=True, layout=layout)
    tensors = case.inputs((2, 20, 24), torch.float32, device)
    ones = tuple(torch.ones((), device=device).expand(output.shape) for output in case.run(inlay, tensors))
    check_gradients(case, tensors, ones)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_in_the_other_order(layout, device):
    case = Case(layout=layout)
    tensors = case.inputs((2, 20, 24), torch.float32, device)
    (dy,) = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, (dy.contiguous(),))
    check_gradients(case, tensors, (PLACES["transposed [B, C, T]"](dy),))


@pytest.mark.parametrize(
    ("strides", "layout"),
    [((0, 24, 1), CHANNELS_INNERMOST), ((480, 0, 1), CHANNELS_INNERMOST), ((20, 1, 0), TOKENS_INNERMOST)],
)
def test_expanded_inputs(strides, layout, device):
    tensors = Case().inputs((2, 20, 24), torch.float32, device)
    tensors["x"] = torch.randn(2 * 20 * 24, device=device).as_strided((2, 20, 24), strides)
    check_values(Case(layout=layout), tensors)
    check_gradients(Case(layout=layout), tensors, random_like(Case().run(inlay, tensors)))


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    gaps=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    order=st.sampled_from([(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1)]),
    width=st.integers(2, 8),
)
def test_any_strides(sizes, gaps, order, width, device):
    """Dimensions in any order in memory that has channels or tokens innermost, with gaps between them."""
    torch.manual_seed(0)  # for each example, so that a failure repeats

    def scatter(t: Tensor) -> Tensor:
        strides, pitch = [0] * 3, 1
        for dim in reversed(order):
            strides[dim] = pitch
            pitch = pitch * sizes[dim] + gaps[dim]
        out = t.new_full((pitch,), torch.nan).as_strided(t.shape, strides)
        return out.copy_(t)

    case = Case(width=width, bias=True, initial_state=True, final_state=True)
    tensors = case.inputs(sizes, torch.float32, device)
    tensors["x"] = scatter(tensors["x"])
    check_values(case, tensors)
    dy, dfinal_state = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, (scatter(dy), dfinal_state))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_32_bits(layout, device):
    """Two batch rows 2^31 elements apart; on the CPU the memory between them is never touched."""
    strides = (2**31, 16, 1) if layout == CHANNELS_INNERMOST else (2**31, 1, 16)
    x = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device).as_strided((2, 16, 16), strides)
    x.copy_(torch.randn(2, 16, 16))
    tensors = {"x": x, "weight": torch.randn(16, 4, device=device).bfloat16()}
    check_values(Case(), tensors)
    check_gradients(Case(), tensors, random_like(Case().run(inlay, tensors)))
