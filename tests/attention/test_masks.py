"""Queries that see nothing, scores that are infinite or NaN, and key ranges against the masks that they stand for."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.attention.cases import LEAVES, Case, check_gradients, check_values, gradients, random_like
from tests.support.compare import assert_same_bits
from tests.support.devices import HALVES, each_dtype


def check(case: Case, tensors: dict[str, torch.Tensor], **options: object) -> None:
    check_values(case, tensors, **options)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors, **options)), **options)


def assert_blind(case, tensors, rows, **options):
    """Queries ``rows`` of all heads: zeros, minus infinity, and no gradient from or to them."""
    y, lse = case.run(inlay, tensors, **options)
    assert_same_bits(y[rows], torch.zeros_like(y[rows]), "y")
    assert (lse.transpose(1, 2)[rows] == -torch.inf).all()
    grads = gradients(case, inlay, tensors, random_like((y, lse)), **options)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert_same_bits(grads["q"][rows], torch.zeros_like(y[rows]), "dq")
    assert y.isfinite().all()


@each_dtype()
def test_masked_rows(device, dtype):
    case = Case(keys=70, features=("gate",))
    tensors = case.inputs(dtype, device)
    mask = torch.rand(2, 1, 70, 70, device=device) < 0.5
    mask[0, 0, 10:60] = False
    mask[1, 0, :, :] = False
    mask[1, 0, 69] = True
    rows = ~mask.any(-1)[:, 0]
    assert_blind(case, {**tensors, "mask": mask}, rows)
    bias = torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill(~mask, -torch.inf)
    assert_blind(case, {**tensors, "bias": bias}, rows)
    y, _ = case.run(inlay, {**tensors, "mask": mask})
    assert_same_bits(case.run(inlay, {**tensors, "bias": bias})[0], y, "as a mask or as a bias")


@pytest.mark.parametrize("queries", [64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_masked_rows_beside_very_negative_scores(dtype, queries, device):
    """The case for which cuDNN's backward gives NaN: 64 rows more than whole tiles, and lse far below -88.

    Eager code of 16 bits knows such scores to a multiple of 16 and is no measure: what is added to all scores of a row
    changes its lse alone.
    """
    case = Case(queries=queries, keys=queries, dim=64, value_dim=64, heads=2, key_heads=2)
    tensors = case.inputs(dtype, device)
    bias = torch.zeros((2, 1, queries, queries), device=device, dtype=dtype)
    bias[0, 0, : queries // 2] = -torch.inf
    bias[1, 0, 5] = -torch.inf
    blind = bias.isneginf().all(-1)[:, 0]
    assert_blind(case, {**tensors, "bias": bias - 2560}, blind)
    y, lse = case.run(inlay, {**tensors, "bias": bias})
    douts = random_like((y, lse))
    low_y, low_lse = case.run(inlay, {**tensors, "bias": bias - 2560})
    expected = {"y": y, **gradients(case, inlay, {**tensors, "bias": bias}, douts)}
    actual = {"y": low_y, **gradients(case, inlay, {**tensors, "bias": bias - 2560}, douts)}
    torch.testing.assert_close(low_lse[lse.isfinite()], lse[lse.isfinite()] - 2560, rtol=0, atol=2e-3)
    for (
        name,
        want,
    ) in expected.items():  # a score is off by 2^-13 there, a probability by a unit of its dtype
        error = (actual[name].double() - want.double()).norm()
        assert error <= (2**-11 + torch.finfo(dtype).eps) * want.double().norm(), f"{name}: {error / want.norm():.2e}"

    # As Hugging Face's eager masks have it: every score is the same number.
    lowest = torch.full_like(bias, torch.finfo(dtype).min)
    if dtype == torch.float16:
        lowest = lowest.float().fill_(torch.finfo(torch.float32).min)
    y, lse = case.run(inlay, {**tensors, "bias": lowest})
    mean = tensors["v"].double().mean(1, keepdim=True).expand(y.shape)
    assert (y.double() - mean).norm() <= max(torch.finfo(dtype).eps, 2**-18) * mean.norm()
    grads = gradients(case, inlay, {**tensors, "bias": lowest}, random_like((y, lse)))
    assert lse.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("features", [("causal", "gate"), ("bias", "dropout", "lengths")], ids="-".join)
@pytest.mark.parametrize(
    ("edge", "queries", "keys", "dim", "dtype"),
    [
        (16, 200, 230, 64, torch.float32),
        (32, 70, 500, 264, torch.bfloat16),
        (64, 200, 230, 64, torch.bfloat16),
        (128, 270, 260, 40, torch.bfloat16),
    ],
)
def test_masks_that_hide_whole_tiles(edge, queries, keys, dim, dtype, features, device):
    """And that hide nothing of some, in whatever sizes and strides; there are rows that see no key."""
    case = Case(queries, keys, heads=2, key_heads=1, dim=dim, value_dim=dim, features=features)
    for name, mask in _tile_masks(case, edge).items():
        try:
            check(case, {**case.inputs(dtype, device), "mask": mask.to(device)})
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _tile_masks(case: Case, edge: int) -> dict[str, torch.Tensor]:
    def tiles(batch: int, heads: int, queries: int = case.queries, keys: int = case.keys) -> torch.Tensor:
        seen = torch.rand(batch, heads, -(-queries // edge), -(-keys // edge)) < 0.4
        return seen.repeat_interleave(edge, 2).repeat_interleave(edge, 3)[:, :, :queries, :keys]

    sequences = torch.arange(max(case.queries, case.keys)) // 50
    return {
        "of all heads": tiles(1, 1),
        "of each head, with holes": tiles(2, 2) & (torch.rand(2, 2, case.queries, case.keys) < 0.8),
        "of keys": tiles(2, 1, queries=1),
        "of queries": tiles(1, 2, keys=1),
        "transposed": tiles(1, 1, case.keys, case.queries).contiguous().mT,
        "from an odd byte on": torch.nn.functional.pad(tiles(1, 1), (1, 0))[..., 1:],
        "sequences": (sequences[: case.queries, None] == sequences[: case.keys])[None, None],
    }


def test_causal_rows_above_the_first_key(device):
    """More queries than keys: the first ones stand before every key."""
    case = Case(queries=70, keys=20, features=("causal",))
    tensors = case.inputs(torch.float32, device)
    rows = torch.zeros(2, 70, dtype=torch.bool, device=device)
    rows[:, :50] = True
    assert_blind(case, tensors, rows)
    check(case, tensors)


def test_masked_rows_with_sinks(device):
    """The denominator is then the sink's alone: its lse, and gradients to it through lse."""
    case = Case(features=("sinks", "causal"), queries=70, keys=20)
    tensors = case.inputs(torch.float32, device)
    y, lse = case.run(inlay, tensors)
    assert_same_bits(y[:, :50], torch.zeros_like(y[:, :50]), "y")
    assert_same_bits(lse[:, :, :50], tensors["sinks"][:, None].expand(2, 4, 50), "lse")
    check(case, tensors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["bias", "q", "k"])
def test_nan_and_infinity_reach_only_their_rows(name, value, device):
    case = Case(features=("bias",), keys=70, options={"causal": True})
    tensors = case.inputs(torch.float32, device)
    if name == "bias":
        tensors["bias"][0, :, 30, 7] = value
        rows = [30]
    elif name == "q":
        tensors["q"][:, 30] = value
        rows = [30]
    else:
        tensors["k"][:, 7] = value
        rows = list(range(7, 70))
    y, lse = case.run(inlay, tensors)
    expected = case.run(reference, tensors)
    for actual, wanted, axis in zip((y, lse), expected, (1, 2), strict=True):
        bad, wanted_bad = ((~x.isfinite()).transpose(0, axis).flatten(1).any(1) for x in (actual, wanted))
        assert torch.equal(bad, wanted_bad)
        assert set(bad.nonzero()[:, 0].tolist()) <= set(rows)


def test_hidden_nan_in_a_bias_is_not_looked_at(device):
    case = Case(features=("bias",), keys=70, options={"causal": True})
    tensors = case.inputs(torch.float32, device)
    expected = case.run(inlay, tensors)
    above = torch.ones(70, 70, dtype=torch.bool, device=device).triu(1)
    tensors["bias"] = tensors["bias"].masked_fill(above, torch.nan)
    for actual, wanted in zip(case.run(inlay, tensors), expected, strict=True):
        assert_same_bits(actual, wanted, "above the diagonal")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_window_is_its_mask(dtype, device):
    for left, right in ((0, 0), (5, None), (None, 5), (20, 40), (1000, 0), (0, 1000)):
        case = Case(queries=150, keys=170)
        tensors = case.inputs(dtype, device)
        at = torch.arange(150, device=device)[:, None] + 20
        key = torch.arange(170, device=device)
        mask = (key >= at - (1000 if left is None else left)) & (key <= at + (1000 if right is None else right))
        if device == "cuda":  # where masks have kernels of their own
            check_values(case, tensors, window=(left, right))
            continue
        expected = case.run(inlay, {**tensors, "mask": mask})
        for actual, wanted in zip(case.run(inlay, tensors, window=(left, right)), expected, strict=True):
            assert_same_bits(actual, wanted, f"window {left}, {right}")


SIZES = [(64, 64), (64, 100), (30, 64)]


def image_blocks(queries):
    blocks = torch.zeros(2, queries, dtype=torch.int64)
    blocks[0, 3:17], blocks[0, 17:29], blocks[1, 10:] = 1, 2, 5
    return blocks


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_ranges_of_image_blocks(queries, keys, device):
    """Gemma 3: causal and a window, and tokens of one image see each other."""
    blocks = image_blocks(queries).to(device)
    at, key = torch.arange(queries, device=device) + keys - queries, torch.arange(keys, device=device)
    causal = (key <= at[:, None]) & (key >= at[:, None] - 9)
    same = torch.zeros(2, queries, keys, dtype=torch.bool, device=device)
    same[:, :, keys - queries :] = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] > 0)
    _compare(inlay.key_ranges(queries, keys, window=(9, None), blocks=blocks), causal | same, queries, keys, device)


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_ranges_of_prefixes_and_padding(queries, keys, device):
    """PaliGemma: a prefix that everyone sees; and rows that start later."""
    prefix, starts = torch.tensor([25, 0], device=device), torch.tensor([0, 11], device=device)
    at, key = torch.arange(queries, device=device) + keys - queries, torch.arange(keys, device=device)
    mask = (key <= at[:, None]) | (key < prefix[:, None, None])
    mask = mask & (key >= starts[:, None, None])
    _compare(inlay.key_ranges(queries, keys, prefix_lengths=prefix, starts=starts), mask, queries, keys, device)


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_ranges_of_chunks(queries, keys, device):
    """Llama 4: causal within chunks, which padding shifts."""
    starts = torch.tensor([0, 5], device=device)
    at, key = torch.arange(queries, device=device) + keys - queries, torch.arange(keys, device=device)
    first = starts[:, None, None]
    mask = (key <= at[:, None]) & ((key - first).div(16, rounding_mode="floor") == (
        (at[:, None] - first).div(16, rounding_mode="floor")
    )) & (key >= first)  # fmt: skip
    _compare(inlay.key_ranges(queries, keys, chunk_size=16, starts=starts), mask, queries, keys, device)


def test_ranges_beyond_the_keys_are_held_within(device):
    case = Case()
    tensors = case.inputs(torch.float32, device)
    far = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32, device=device).expand(1, 70, 2)
    for actual, wanted in zip(case.run(inlay, {**tensors, "key_ranges": far}), case.run(inlay, tensors), strict=True):
        assert_same_bits(actual, wanted, "everything")


def _compare(ranges, mask, queries, keys, device):
    key = torch.arange(keys, device=device)
    shown = (key >= ranges[..., :1]) & (key < ranges[..., 1:])
    assert torch.equal(shown, mask.expand_as(shown))
    case = Case(queries=queries, keys=keys)
    tensors = case.inputs(torch.bfloat16, device)
    by_mask, by_ranges = {**tensors, "mask": mask[:, None]}, {**tensors, "key_ranges": ranges}
    if device == "cuda":  # where masks have kernels of their own
        check_values(case, by_ranges)
    else:
        for actual, wanted in zip(case.run(inlay, by_ranges), case.run(inlay, by_mask), strict=True):
            assert_same_bits(actual, wanted, "ranges or a mask")
    check_gradients(case, by_ranges, random_like(case.run(inlay, tensors)))
    assert {"q", "k", "v"} <= set(LEAVES)
