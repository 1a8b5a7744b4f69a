"""Masks, biases and dropout at every width, around every tile's edge, and in whatever strides they come."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import Case, check_gradients, check_values, gradients, random_like
from tests.support.compare import assert_same_bits
from tests.support.devices import HALVES

# Widths that one, two, four and eight warps of the general CUDA kernels share, in 16 bits and in float32.
DIMS = [(24, 40), (64, 64), (72, 72), (128, 128), (136, 96), (192, 128), (256, 256), (264, 8), (8, 512), (512, 512)]
SCORES = [("mask", "bias"), ("dropout", "softcap"), ("bias", "sinks", "gate", "causal")]


def check(case, tensors, **options):
    check_values(case, tensors, **options)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors, **options)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("features", SCORES, ids="-".join)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_widths(dim, value_dim, features, dtype, device):
    case = Case(150, 70, 1, heads=2, key_heads=1, dim=dim, value_dim=value_dim, features=features)
    check(case, case.inputs(dtype, device))


@pytest.mark.parametrize("edge", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_around_edges(edge, dtype, device):
    for queries, keys in ((edge - 1, edge), (edge, edge + 1), (edge + 1, edge - 1), (1, edge), (edge, 1)):
        case = Case(queries, keys, 1, 2, 1, features=("mask", "causal", "gate"))
        check(case, case.inputs(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_strides(name, dtype, device):
    """Transposed, with an odd offset, with odd rows, every other key, and expanded."""
    case = Case(features=(name,))
    tensors = case.inputs(dtype, device)
    scores = tensors[name]
    views = [
        scores.mT.contiguous().mT,
        torch.nn.functional.pad(scores, (1, 0))[..., 1:],
        torch.nn.functional.pad(scores, (0, 1))[..., :-1],
        scores.repeat_interleave(2, -1)[..., ::2],
        scores[:, :, :1].expand(-1, -1, scores.shape[2], -1),
    ]
    for view in views:
        check(case, {**tensors, name: view})
    expected = case.run(inlay, tensors)
    for view in views[:-1]:
        for actual, wanted in zip(case.run(inlay, {**tensors, name: view}), expected, strict=True):
            assert_same_bits(actual, wanted, f"{name} with strides {view.stride()}")


@pytest.mark.parametrize("features", [("mask", "bias"), ("dropout", "ranges"), ("bias", "lengths")], ids="-".join)
def test_long_rows(features, device):
    """Many tiles of keys, and of queries, with larger scores in each that follows."""
    case = Case(400, 700, 1, 2, 1, features=features)
    tensors = case.inputs(torch.bfloat16, device)
    tensors["k"] *= (2.0 ** (torch.arange(700, device=device) // 100 / 2)).bfloat16()[:, None, None]
    check(case, tensors)


@pytest.mark.cuda
@pytest.mark.parametrize("features", [(), ("mask", "bias", "dropout")], ids=str)
def test_products_of_float32(features):
    """As accurate as float32, unless torch may use tf32, whose products are off by 2^-11 each."""
    case = Case(300, 400, dim=128, value_dim=128, features=features)
    tensors = case.inputs(torch.float32, "cuda")
    douts = random_like(case.run(inlay, tensors))
    check(case, tensors)
    exact = {"y": case.run(inlay, tensors)[0], **gradients(case, inlay, tensors, douts)}
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = {"y": case.run(inlay, tensors)[0], **gradients(case, inlay, tensors, douts)}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, result in rounded.items():
        error = (result - exact[name]).norm() / exact[name].norm()
        assert 1e-5 < error < 4e-3, f"{name}: {error:.3g}"
