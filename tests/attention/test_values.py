"""Is every feature, and every two of them together, as accurate as eager code? And every width, length and size?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay import reference
from tests.attention.cases import MODELS, PAIRS, SINGLES, Case, check_values
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import HALVES, each_dtype

# Around the tiles of every kernel.
LENGTHS = [1, 2, 15, 16, 17, 47, 48, 49, 64, 65, 95, 97, 127, 128, 129, 145, 192, 193, 385, 600]
HEAD_DIMS = [8, 16, 24, 40, 64, 72, 80, 96, 104, 128, 160, 192, 200, 256, 264, 512]


@each_dtype()
@pytest.mark.parametrize("case", [*SINGLES, *MODELS], ids=str)
def test_features(case, device, dtype):
    check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_of_features(case, dtype, device):
    check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, dtype, device):
    case = Case(dim=dim, value_dim=dim, features=("causal",), batch=1, heads=2, key_heads=1)
    check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (64, 512), (512, 64), (8, 256), (256, 8), (40, 72)])
def test_values_of_another_width(dim, value_dim, device):
    case = Case(dim=dim, value_dim=value_dim, features=("causal", "gate"), batch=1)
    check_values(case, case.inputs(torch.bfloat16, device))


@pytest.mark.parametrize("features", [(), ("causal",), ("window",)], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, features, device):
    """As many queries as keys, and fewer or more of them."""
    for queries, keys in ((length, length), (length, 130), (50, length)):
        case = Case(queries=queries, keys=keys, features=features, batch=1, heads=2, key_heads=1)
        check_values(case, case.inputs(torch.bfloat16, device))


@given(
    queries=st.integers(0, 200),
    keys=st.integers(0, 200),
    group=st.integers(1, 5),
    key_heads=st.integers(1, 3),
    dim=st.sampled_from([8, 24, 64]),
    left=st.none() | st.integers(0, 150),
    right=st.none() | st.integers(0, 150),
    causal=st.booleans(),
)
def test_shapes(queries, keys, group, key_heads, dim, left, right, causal, device):
    case = Case(
        queries=queries, keys=keys, batch=1, heads=group * key_heads, key_heads=key_heads, dim=dim, value_dim=dim,
        options={"window": (left, right), "causal": causal},
    )  # fmt: skip
    check_values(case, case.inputs(torch.float32, device))


@pytest.mark.parametrize("keys", [1, 5, 128, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=str)
def test_one_query(heads, keys, device):
    """Decoding: the query stands at the last key."""
    case = Case(queries=1, keys=keys, heads=heads[0], key_heads=heads[1], features=("causal", "sinks"))
    tensors = case.inputs(torch.bfloat16, device)
    check_values(case, tensors)
    assert_same_bits(case.run(inlay, tensors)[0], case.run(inlay, tensors, causal=False)[0], "causal or not")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("size", [30.0, 1000.0, 0.0])
def test_scores_of_any_size(size, dtype, device):
    """Where one key takes all, which the last place of its score may decide; and where all are alike."""
    case = Case(features=("causal",), size=size, batch=1)
    tensors = case.inputs(dtype, device)
    tensors["k"] = tensors["k"].round()  # products and scores are exact, whatever their order
    tensors["q"] = tensors["q"].round()
    check_values(case, tensors, scale=1.0)


def test_scale_and_its_default(device):
    case = Case(features=("causal",))
    tensors = case.inputs(torch.float32, device)
    check_values(case, tensors, scale=0.3)
    expected = case.run(inlay, tensors, scale=case.dim**-0.5)
    for actual, wanted in zip(case.run(inlay, tensors), expected, strict=True):
        assert_same_bits(actual, wanted, "default scale")


@pytest.mark.parametrize("case", [Case(features=("causal",)), Case(features=("window", "gate"))], ids=str)
def test_lse_or_not_makes_no_difference(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    y, _ = case.run(inlay, tensors)
    assert_same_bits(case.run(inlay, tensors, return_lse=False), y, "y")


@pytest.mark.parametrize("shape", [(0, 5, 7, 2), (2, 0, 7, 2), (2, 5, 0, 2), (2, 5, 7, 0), (2, 0, 0, 2)], ids=str)
def test_empty(shape, device):
    batch, queries, keys, heads = shape
    case = Case(batch=batch, queries=queries, keys=keys, heads=heads, key_heads=heads)
    tensors = case.inputs(torch.float32, device)
    for actual, expected in zip(case.run(inlay, tensors), case.run(reference, tensors), strict=True):
        assert_same_bits(actual, expected, str(shape))


def test_sdpa_agrees(device):
    """The reference itself against torch's function, where both know how."""
    case = Case(features=("causal", "mask"), queries=90)
    tensors = widened(case.inputs(torch.float32, device))
    mask = tensors["mask"] & torch.ones(90, 90, dtype=torch.bool, device=device).tril()
    q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    seen = mask.any(-1, keepdim=True)
    expected = torch.where(seen, expected, 0.0).transpose(1, 2)
    y, _ = case.run(reference, tensors)
    assert_within_budget(y, expected, expected, "y")


def widened(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
