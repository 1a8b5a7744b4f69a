"""What only kernels that work on tiles can get wrong, on the GPU: lengths around the tiles' edges, windows of which a
tile sees only a part, scores that outgrow those of the first tile, and what lies behind a sequence's end."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import Case, check_values
from tests.support.devices import HALVES

pytestmark = pytest.mark.cuda

# A head dimension of each shape of the kernels, and one that leaves a part of it empty.
DIMS = [(32, 32), (8, 16), (40, 40), (64, 64), (56, 24), (80, 80), (72, 72), (96, 88), (128, 128), (120, 104)]
DIMS += [(160, 160), (136, 152), (192, 128), (192, 192), (168, 184), (256, 256), (248, 200)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_dims(dim, value_dim, dtype):
    for names in ((), ("causal", "gate", "sinks")):
        case = Case(queries=300, keys=333, dim=dim, value_dim=value_dim, features=names)
        tensors = case.inputs(dtype, "cuda")
        check_values(case, tensors)


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("edge", [64, 80, 128, 192, 256, 384])
def test_lengths_around_edges(edge, dim):
    for queries, keys in ((edge - 1, edge), (edge, edge + 1), (edge + 1, edge - 1), (1, edge), (edge, 1)):
        for features in ((), ("causal",), ("window", "lengths")):
            case = Case(queries=queries, keys=keys, dim=dim, value_dim=dim, features=features)
            check_values(case, case.inputs(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (127, 0), (128, 0), (200, 64), (None, 5), (3, None)], ids=str)
def test_windows(window, dim):
    for features in ((), ("lengths",), ("ranges",)):
        case = Case(queries=500, keys=650, dim=dim, value_dim=dim, features=features, options={"window": window})
        check_values(case, case.inputs(torch.bfloat16, "cuda"))
    case = Case(batch=1, queries=900, keys=700, dim=dim, features=("packed",), options={"window": window})
    check_values(case, case.inputs(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("growth", [4.0, 30.0, 200.0])
def test_scores_that_grow_from_tile_to_tile(growth, dim, dtype):
    """Tiles of keys are taken from the last to the first: each has larger scores than all before it."""
    case = Case(queries=200, keys=600, dim=dim, value_dim=dim)
    tensors = case.inputs(dtype, "cuda")
    steps = torch.arange(600, device="cuda").flip(0) // 60
    tensors["k"] *= (growth ** (steps / 9)).to(dtype)[:, None, None]
    check_values(case, tensors)


def test_a_nan_in_a_late_tile_is_not_lost():
    case = Case(queries=100, keys=600, dim=128, value_dim=128)
    tensors = case.inputs(torch.bfloat16, "cuda")
    tensors["k"][0, 50, 0, 3] = torch.nan
    y, lse = case.run(inlay, tensors)
    assert y[0, :, :2].isnan().all()  # the key head's two query heads
    assert lse[0, :2].isnan().all()
    assert y[0, :, 2:].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_lies_behind_a_sequence_is_not_seen(dim):
    case = Case(batch=1, queries=400, keys=400, dim=dim, value_dim=dim, options={"causal": True})
    offsets = torch.tensor([0, 150, 400], dtype=torch.int32, device="cuda")
    tensors = {**case.inputs(torch.bfloat16, "cuda"), "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    expected = case.run(inlay, tensors)
    for name in ("k", "v"):
        tensors[name][:, 150:] = torch.nan
    for actual, exact, tokens in zip(case.run(inlay, tensors), expected, (1, 2), strict=True):
        assert torch.equal(actual.narrow(tokens, 0, 150), exact.narrow(tokens, 0, 150))
        assert actual.narrow(tokens, 150, 250).isnan().all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_same_bits_every_time(dim):
    case = Case(features=("causal",), queries=1000, keys=1000, dim=dim, value_dim=dim, heads=8)
    tensors = case.inputs(torch.bfloat16, "cuda")
    first = case.run(inlay, tensors)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(case.run(inlay, tensors), first, strict=True))
