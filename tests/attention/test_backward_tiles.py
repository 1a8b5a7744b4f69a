"""The backward's tiles on CUDA: every shape of the kernels, lengths around their edges, and how tiles add up to dq."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import Case, check_gradients, gradients, random_like
from tests.attention.test_tiles import DIMS
from tests.support.compare import assert_same_bits
from tests.support.devices import HALVES

pytestmark = pytest.mark.cuda


def _check(case, dtype=torch.bfloat16):
    tensors = case.inputs(dtype, "cuda")
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_dims(dim, value_dim, dtype):
    for features in ((), ("causal", "gate", "sinks"), ("softcap", "window")):
        _check(Case(queries=300, keys=333, dim=dim, value_dim=value_dim, features=features), dtype)


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("edge", [64, 128, 192, 256, 384])
def test_lengths_around_edges(edge, dim):
    for queries, keys in ((edge - 1, edge), (edge, edge + 1), (edge + 1, edge - 1), (1, edge), (edge, 1)):
        for features in ((), ("causal",), ("window", "lengths")):
            _check(Case(queries=queries, keys=keys, dim=dim, value_dim=dim, features=features))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(0, 0), (127, 0), (200, 64), (None, 5), (3, None)], ids=str)
def test_windows(window, dim):
    for features in ((), ("lengths",), ("ranges",)):
        _check(Case(queries=500, keys=650, dim=dim, value_dim=dim, features=features, options={"window": window}))
    _check(Case(batch=1, queries=900, keys=700, dim=dim, features=("packed",), options={"window": window}))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles_and_heads(dim):
    for features in ((), ("causal",), ("ranges",)):
        _check(Case(queries=1500, keys=1500, heads=12, key_heads=2, batch=1, dim=dim, value_dim=dim, features=features))


@pytest.mark.parametrize(
    "features", [(), ("causal",), ("causal", "window", "lengths"), ("ranges",), ("packed", "causal")], ids="-".join
)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_in_order_or_not(dim, features):
    """In order the bits are the same every time; in any order dq differs by rounding alone, and the others not."""
    batch = 1 if "packed" in features else 3
    case = Case(features=features, queries=1000, keys=1100, batch=batch, dim=dim, value_dim=dim, heads=8)
    tensors = case.inputs(torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    first = gradients(case, inlay, tensors, douts, deterministic=True)
    for _ in range(20):
        for name, grad in gradients(case, inlay, tensors, douts, deterministic=True).items():
            assert_same_bits(grad, first[name], f"d{name}")
    for name, grad in gradients(case, inlay, tensors, douts, deterministic=False).items():
        if name == "q":
            assert (grad.float() - first[name].float()).norm() < 1e-2 * first[name].float().norm()
        else:
            assert_same_bits(grad, first[name], f"d{name}")


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_lies_behind_a_sequence_is_not_seen(dim):
    case = Case(batch=1, queries=400, keys=400, dim=dim, value_dim=dim, options={"causal": True})
    offsets = torch.tensor([0, 150, 400], dtype=torch.int32, device="cuda")
    tensors = {**case.inputs(torch.bfloat16, "cuda"), "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    douts = random_like(case.run(inlay, tensors))
    expected = gradients(case, inlay, tensors, douts, deterministic=True)
    for name in ("q", "k", "v"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, 150:] = torch.nan
    for name, grad in gradients(case, inlay, tensors, douts, deterministic=True).items():
        assert_same_bits(grad[:, :150], expected[name][:, :150], f"d{name}")
        assert grad[:, 150:].isnan().any()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("queries", [192, 320])
def test_very_negative_scores(queries, dim):
    """Rows whose lse is far below any exponential's range, beside rows that see nothing."""
    case = Case(queries=queries, keys=256, dim=dim, value_dim=dim, features=("lengths",))
    tensors = case.inputs(torch.bfloat16, "cuda")
    tensors["q"][..., 0], tensors["k"][..., 0] = 100.0, -100.0
    y, lse = case.run(inlay, tensors)
    assert lse[1].max() < -500
    assert (lse[0] == -torch.inf).all()
    douts = random_like((y, lse))
    grads = gradients(case, inlay, tensors, douts)
    # A number added to all scores changes lse alone, and the gradients of what it was made from.
    tensors["q"][..., 0], tensors["k"][..., 0] = 0.0, 0.0
    low, (want_y, want_lse) = -1e4 * dim**-0.5, case.run(inlay, tensors)
    torch.testing.assert_close(lse[1], want_lse[1] + low, rtol=0, atol=2e-2)
    assert (y - want_y).float().norm() < 1e-2 * want_y.float().norm()
    for name, want in gradients(case, inlay, tensors, douts).items():
        grad = grads[name]
        assert grad.isfinite().all(), name
        assert (grad[0] == 0).all(), name
        own = slice(1, None) if name in "qk" else slice(None)
        assert (grad - want)[..., own].float().norm() < 1e-2 * want[..., own].float().norm(), name
