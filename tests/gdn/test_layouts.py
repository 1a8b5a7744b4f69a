"""Are strided inputs and gradients read in place and rightly?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import inlay
from tests.gdn.cases import (
    BASIC,
    Tensors,
    check_gradients,
    check_values,
    gradients,
    kernel_dtype,
)
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

ROWS = ("q", "k", "v")


def slices_of_one_projection(tensors: Tensors) -> Tensors:
    """As Hugging Face splits the convolution's output."""
    flat = torch.cat([tensors[name].flatten(2) for name in ROWS], -1)
    parts = flat.split([tensors[name].flatten(2).shape[-1] for name in ROWS], -1)
    return {**tensors, **{name: part.view(tensors[name].shape) for name, part in zip(ROWS, parts, strict=True)}}


def each(change: Callable[[Tensor], Tensor], names: tuple[str, ...] = ROWS) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(t) if name in names else t for name, t in tensors.items()}


GATES = ("g", "beta")
LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "slices of one projection": slices_of_one_projection,
    "transposed [B, H, T, D]": each(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "one element past alignment": each(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)),
    "odd row pitch": each(lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1]),
    "every other token": each(lambda t: t.repeat_interleave(2, 1)[:, ::2], (*ROWS, *GATES)),
    "gates transposed": each(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), GATES),
    "gates with a stride": each(lambda t: torch.stack([t, t], -1)[..., 0], GATES),
    "states of a pool": each(lambda t: torch.cat([t, t], 1)[:, : t.shape[1]], ("initial_state",)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_layouts(case, layout, device):
    tensors = case.inputs(torch.bfloat16, device)
    laid_out = layout(tensors)
    assert any(not t.is_contiguous() or t.storage_offset() for t in laid_out.values())
    expected = case.run(inlay, tensors)
    for output, wanted in zip(case.run(inlay, laid_out), expected, strict=True):
        assert_same_bits(output, wanted, "output")
    douts = random_like(expected)
    expected_grads = gradients(case, inlay, tensors, douts)
    for name, grad in gradients(case, inlay, laid_out, douts).items():
        assert_same_bits(grad, expected_grads[name], f"d{name}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_shared_keys_by_expansion(case, device):
    """Stride 0 over the heads: the same key for all of them."""
    tensors = case.inputs(torch.float32, device)
    tensors["k"] = tensors["k"][:, :, :1].expand_as(tensors["k"])
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


GRADIENT_LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "a sum's": lambda t: torch.ones((), dtype=t.dtype, device=t.device).expand_as(t),
}


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS.values(), ids=GRADIENT_LAYOUTS.keys())
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_of_any_strides(case, layout, device):
    tensors = case.inputs(kernel_dtype(device), device)
    douts = tuple(layout(dout) for dout in random_like(case.run(inlay, tensors)))
    dense = tuple(dout.contiguous() for dout in douts)
    expected = gradients(case, inlay, tensors, dense)
    for name, grad in gradients(case, inlay, tensors, douts).items():
        assert_same_bits(grad, expected[name], f"d{name}")


def test_offsets_beyond_32_bits(device):
    """Two tokens 2^31 elements apart; on the CPU the memory between them is never touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    v = base.as_strided((1, 2, 1, 64), (1, 2**31, 64, 1))
    v.copy_(torch.randn(1, 2, 1, 64))
    q, k = (torch.randn(1, 2, 1, 64, device=device).bfloat16() for _ in range(2))
    g, beta = -torch.rand(1, 2, 1, device=device), torch.rand(1, 2, 1, device=device)
    for mode in ("chunk", "recurrent"):
        expected = inlay.gated_delta_rule(q, k, v.contiguous(), g, beta, mode=mode)
        assert_same_bits(inlay.gated_delta_rule(q, k, v, g, beta, mode=mode), expected, mode)
