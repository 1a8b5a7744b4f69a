"""Sequences packed into one row: nothing leaks from one into the next, in the convolution or in the rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens
from tests.hf.test_gdn_layer import families, gdn_layer, hidden, new_cache

LENGTHS = [5, 70, 1, 0, 20]


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def numbers(lengths: list[int], device: str) -> Tensor:
    """seq_idx of one row."""
    return torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))[None]


def separately(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([layer(piece) for piece in x.split(lengths, dim=1) if piece.shape[1]], 1)


def with_gradients(layer: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@families
@pytest.mark.parametrize("said_by", ["cu_seq_lens_q", "seq_idx", "both"])
@pytest.mark.parametrize("grad", [True, False])
def test_packed_is_separate(family: str, said_by: str, grad: bool, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 1, sum(LENGTHS)).requires_grad_()
    packing = {"cu_seq_lens_q": offsets(LENGTHS, device), "seq_idx": numbers(LENGTHS, device)}
    if said_by != "both":
        packing = {said_by: packing[said_by]}
    inlay.patch(layer, strict=True)
    with torch.set_grad_enabled(grad):
        packed, apart = layer(x, **packing), separately(layer, x, LENGTHS)
        mixed = layer(x)
        pairs = zip(with_gradients(layer, x, packed), with_gradients(layer, x, apart), strict=True) if grad else ()
    assert_same_values(packed, apart, "output")
    assert (mixed - apart).abs().max() > 0.01 * apart.abs().max(), "this test cannot see a leak"
    for index, (ours, theirs) in enumerate(pairs):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4, index


@families
@torch.no_grad()
def test_nothing_of_one_sequence_reaches_another(family: str, device: str) -> None:
    """Bit for bit: NaN in one sequence leaves the others as they were."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 1, 40)
    inlay.patch(layer, strict=True)
    packing = {"cu_seq_lens_q": offsets([13, 12, 15], device)}
    clean = layer(x, **packing)
    x[:, 13:25] = torch.nan
    actual = layer(x, **packing)
    assert actual[:, 13:25].isnan().all()
    assert torch.equal(actual[:, :13], clean[:, :13])
    assert torch.equal(actual[:, 25:], clean[:, 25:])


@families
@torch.no_grad()
def test_several_rows_of_packed_sequences(family: str, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 12)
    rows = [[5, 7], [10, 2]]
    inlay.patch(layer, strict=True)
    actual = layer(x, seq_idx=torch.cat([numbers(lengths, device) for lengths in rows]))
    for index, lengths in enumerate(rows):
        assert_same_values(actual[index : index + 1], separately(layer, x[index : index + 1], lengths), "row")


@families
@torch.no_grad()
def test_a_cache_goes_on_with_the_last_sequence(family: str, device: str) -> None:
    """Models make a cache unless told not to, in training too. The last sequence is shorter than the convolution."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 1, 24)
    inlay.patch(layer, strict=True)
    cache, alone = new_cache(), new_cache()
    layer(x[:, :20], cache_params=cache, cu_seq_lens_q=offsets([18, 2], device))
    layer(x[:, 18:20], cache_params=alone)
    assert cache.layers[0].conv_states[0].shape == alone.layers[0].conv_states[0].shape
    for piece in x[:, 20:].split(1, dim=1):
        assert_same_values(layer(piece, cache_params=cache), layer(piece, cache_params=alone), "next token")


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_packed_model(family: str, device: str) -> None:
    """A whole model, given what transformers' collator gives."""
    model = language_model(family, device)
    ids = tokens(model, batch=1, length=30)
    lengths = [12, 18]
    inlay.patch(model, strict=True)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    cu = offsets(lengths, device)
    packing = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "seq_idx": numbers(lengths, device).int()}
    # Without a cache, from the positions, transformers also keeps the sequences apart in attention.
    packed = model(ids, position_ids=positions, use_cache=False, **packing).logits
    apart = torch.cat([model(piece).logits for piece in ids.split(lengths, dim=1)], 1)
    assert_same_values(packed, apart, "logits")


@pytest.mark.parametrize(
    ("batch", "packing", "with_cache", "reason"),
    [
        (2, "cu_seq_lens_q", False, "cu_seq_lens_q is given for more than one batch row"),
        (1, "seq_idx", True, "seq_idx is given without cu_seq_lens_q, and with a cache"),
        (1, "short seq_idx", False, "seq_idx is [1, 8] for [1, 9] tokens"),
        (1, "cu_seq_lens_q", True, "packed sequences go on with a cache"),
    ],
)
def test_what_cannot_be_packed(batch: int, packing: str, with_cache: bool, reason: str) -> None:
    layer = gdn_layer("qwen3_5")
    inlay.patch(layer, strict=True)
    x = hidden(layer, batch, 9)
    cache = new_cache() if with_cache else None
    if with_cache and packing == "cu_seq_lens_q":
        layer(x, cache_params=cache)
    given = {
        "cu_seq_lens_q": {"cu_seq_lens_q": offsets([4, 5], "cpu")},
        "seq_idx": {"seq_idx": numbers([4, 5], "cpu")},
        "short seq_idx": {"seq_idx": numbers([4, 4], "cpu")},
    }[packing]
    with pytest.raises(RuntimeError) as error:
        layer(x, cache_params=cache, **given)
    assert str(error.value) == f"inlay: gdn_layer of the root module fell back: {reason}"
