"""Are strided inputs and gradients read in place and rightly?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import inlay
from tests.attention.cases import BASIC, Case, Tensors, check_gradients, check_values, gradients, random_like
from tests.support.compare import assert_same_bits

ROWS = ("q", "k", "v", "gate")


def each(change: Callable[[Tensor], Tensor], names: tuple[str, ...] = ROWS) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(t) if name in names else t for name, t in tensors.items()}


def slices_of_one_projection(tensors: Tensors) -> Tensors:
    """k and v as rows of one matrix product, and q beside its gate as in Qwen3.5."""
    kv = torch.cat([tensors["k"], tensors["v"]], -1)
    changed = {"k": kv[..., : tensors["k"].shape[-1]], "v": kv[..., tensors["k"].shape[-1] :]}
    if "gate" in tensors:
        pair = torch.cat([tensors["q"], tensors["gate"]], -1)
        changed |= {"q": pair[..., : tensors["q"].shape[-1]], "gate": pair[..., tensors["q"].shape[-1] :]}
    return {**tensors, **changed}


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "slices of one projection": slices_of_one_projection,
    "transposed [B, H, S, D]": each(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "one element past alignment": each(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)),
    "odd row pitch": each(lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1]),
    "every other token": each(lambda t: t.repeat_interleave(2, 1)[:, ::2]),
    "last dimension strided": each(lambda t: t.transpose(1, 3).contiguous().transpose(1, 3)),
    "scores transposed": each(lambda t: t.mT.contiguous().mT, ("mask", "bias")),
    "every other score": each(lambda t: t.repeat_interleave(2, 3)[..., ::2], ("mask", "bias")),
    "scores expanded": each(lambda t: t[:1, :1].expand(2, 4, -1, -1), ("mask", "bias")),
    "ranges expanded": each(lambda t: t[:, :1].expand_as(t), ("key_ranges",)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_layouts(case, layout, device):
    tensors = case.inputs(torch.bfloat16, device)
    laid_out = layout(tensors)
    dense = {name: t.clone(memory_format=torch.contiguous_format) for name, t in laid_out.items()}
    expected = case.run(inlay, dense)
    for output, wanted in zip(case.run(inlay, laid_out), expected, strict=True):
        assert_same_bits(output, wanted, "output")
    douts = random_like(expected)
    expected_grads = gradients(case, inlay, dense, douts)
    for name, grad in gradients(case, inlay, laid_out, douts).items():
        assert_same_bits(grad, expected_grads[name], f"d{name}")


@pytest.mark.parametrize("case", [Case(), Case(features=("causal",))], ids=str)
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
    tensors = case.inputs(torch.bfloat16, device)
    douts = tuple(layout(dout) for dout in random_like(case.run(inlay, tensors)))
    dense = tuple(dout.contiguous() for dout in douts)
    expected = gradients(case, inlay, tensors, dense)
    for name, grad in gradients(case, inlay, tensors, douts).items():
        assert_same_bits(grad, expected[name], f"d{name}")


def test_outputs_are_contiguous(device):
    tensors = each(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))(Case().inputs(torch.bfloat16, device))
    y, lse = Case().run(inlay, tensors)
    assert y.is_contiguous()
    assert lse.is_contiguous()


def test_offsets_beyond_32_bits(device):
    """Two tokens 2^31 elements apart; on the CPU the memory between them is never touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    v = base.as_strided((1, 2, 1, 64), (1, 2**31, 64, 1))
    v.copy_(torch.randn(1, 2, 1, 64))
    q, k = (torch.randn(1, 2, 1, 64, device=device).bfloat16() for _ in range(2))
    for causal in (False, True):
        expected = inlay.attention(q, k, v.contiguous(), causal=causal)
        assert_same_bits(inlay.attention(q, k, v, causal=causal), expected, "v")
    v.copy_(k)
    assert_same_bits(inlay.attention(q, v, k), inlay.attention(q, k, k), "k")
