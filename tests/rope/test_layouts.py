"""Are strided inputs and gradients read in place and rightly, wherever they lie?"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import inlay
from tests.rope.cases import BASIC, FLAT, OWN, Case, check_gradients, check_values, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

# Each lays a tensor [B, S, H, D] out in another way. Values are the tensor's own.
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "first heads of a packed projection": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    "last heads of it": lambda t: torch.cat([t, t], 2)[:, :, t.shape[2] :],
    "a query and a gate side by side": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "behind the gate": lambda t: torch.cat([t, t], 3)[..., t.shape[3] :],
    "transposed [B, H, S, D]": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "[S, B, H, D]": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "odd pitch": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "a slice of more tokens": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "every second head": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "one element past alignment": lambda t: misaligned(t, 1),
}


def misaligned(t: Tensor, offset: int) -> Tensor:
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)


@pytest.mark.parametrize("shape", [(2, 9, 4, 2, 64), (1, 5, 3, 3, 128), (2, 4, 2, 1, 36)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_places(place, case, shape, device):
    tensors = case.inputs(shape, torch.bfloat16, device)
    tensors |= {name: place(tensors[name]) for name in "qk"}
    check_values(case, tensors)
    check_gradients(case, tensors, tuple(place(dout) for dout in random_like(case.run(inlay, tensors))))


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("case", [BASIC[0], BASIC[3]], ids=str)
def test_a_place_changes_no_bit_where_the_kernel_is_the_same(place, case, device):
    tensors = case.inputs((2, 9, 4, 2, 64), torch.bfloat16, device)
    placed = tensors | {name: place(tensors[name]) for name in "qk"}
    if device == "cuda" and (placed["q"].stride(2) % 8 or placed["q"].data_ptr() % 16):
        pytest.skip("read by other kernels, whose sums run in another order")
    for output, expected in zip(case.run(inlay, placed), case.run(inlay, tensors), strict=True):
        assert_same_bits(output, expected, "output")


@pytest.mark.parametrize("width", [64, 36])
def test_strided_angles(width, device):
    """Slices of longer tables, of wider ones, and expanded batches."""
    case = Case(batches=FLAT)
    tensors = case.inputs((2, 9, 4, 2, width), torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch.cat([t, t])[t.shape[0] :],
        lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
        lambda t: torch.nn.functional.pad(t, (0, 1))[:, :-1],
        lambda t: misaligned(t, 1),
        lambda t: t.expand(2, -1, -1),
        lambda t: t.unsqueeze(0),
        lambda t: torch.stack([t, t], 1).transpose(0, 1),
    ]
    for lay_out in layouts:
        angles = {name: lay_out(tensors[name]) for name in ("cos", "sin")}
        check_values(case, tensors | angles)
        check_gradients(case, tensors | angles, random_like(expected))


def test_cos_and_sin_may_lie_differently(device):
    case = Case(norm=False, batches=OWN)
    tensors = case.inputs((2, 9, 4, 2, 64), torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    tensors["cos"] = tensors["cos"].transpose(0, 1).contiguous().transpose(0, 1)
    for output, wanted in zip(case.run(inlay, tensors), expected, strict=True):
        assert_same_bits(output, wanted, "output")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_misaligned_weights(case, device):
    tensors = case.inputs((2, 5, 4, 2, 64), torch.bfloat16, device)
    tensors |= {name: misaligned(t, 1) for name, t in tensors.items() if t.dim() == 1}
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_of_any_strides(case, device):
    """Autograd hands over whatever the next operation made: expanded ones, too."""
    tensors = case.inputs((2, 5, 4, 2, 64), torch.float32, device)
    leaves = {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    q, k = case.run(inlay, leaves)
    (q.sum() + k.sum(dim=3).sum()).backward()
    ones = gradients(case, inlay, tensors, (torch.ones_like(q), torch.ones_like(k)))
    for name, grad in ones.items():
        assert_same_bits(leaves[name].grad, grad, f"d{name}")
    q, k = case.run(inlay, leaves)
    douts = (torch.randn_like(q.transpose(1, 3)).contiguous().transpose(1, 3), torch.zeros_like(k))
    dense = gradients(case, inlay, tensors, tuple(dout.contiguous() for dout in douts))
    for name, grad in gradients(case, inlay, tensors, douts).items():
        assert_same_bits(grad, dense[name], f"d{name}")


def test_slices_of_one_projection(device):
    """q, k and v side by side, as one product makes them: no copy is needed, and the gradient arrives in its place."""
    projection = torch.randn(2, 7, (4 + 2 + 2) * 64, device=device).bfloat16().requires_grad_()
    case = Case(norm=False, one_angle_per_pair=True)
    angles = {n: t for n, t in case.inputs((2, 7, 4, 2, 64), torch.bfloat16, device).items() if n in ("cos", "sin")}
    q, k, _ = projection.unflatten(-1, (8, 64)).split([4, 2, 2], dim=2)
    outputs = case.run(inlay, {"q": q, "k": k, **angles})
    assert outputs[0].transpose(1, 2).shape == (2, 4, 7, 64)
    sum(output.float().square().sum() for output in outputs).backward()
    # A rotation keeps lengths: the gradient of the sum of squares is twice the input.
    rotated = slice(0, 6 * 64)
    twice = 2 * projection.detach()[..., rotated]
    torch.testing.assert_close(projection.grad[..., rotated], twice, rtol=0.05, atol=0.1)
    assert not projection.grad[..., 6 * 64 :].any()


@given(
    order=st.permutations(range(3)),
    slack=st.tuples(*[st.integers(0, 2)] * 4),
    case=st.sampled_from(BASIC),
    width=st.sampled_from([32, 64, 20]),
)
def test_any_strides(order, slack, case, width, device):
    torch.manual_seed(0)

    def lay_out(t: Tensor) -> Tensor:
        sizes = [t.shape[i] + slack[i] for i in order] + [t.shape[3] + 8 * slack[3]]
        storage = t.new_zeros(sizes)
        back = [order.index(i) for i in range(3)] + [3]
        view = storage.permute(back)[tuple(slice(0, size) for size in t.shape)]
        return view.copy_(t)

    tensors = case.inputs((2, 4, 3, 2, width), torch.bfloat16, device)
    tensors |= {name: lay_out(tensors[name]) for name in "qk"}
    check_values(case, tensors)
    check_gradients(case, tensors, tuple(lay_out(dout) for dout in random_like(case.run(inlay, tensors))))
