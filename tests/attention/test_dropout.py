"""Is dropout a fair and reproducible choice, the same in the backward, in every layout and on every device?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from inlay.reference.attention import _philox, dropout_threshold
from tests.attention.cases import BASIC, Case
from tests.support.compare import assert_same_bits


def kept(device, p, batch=1, queries=64, keys=96, heads=2, **options):
    """[B, H, Sq, Sk]: the probabilities after dropout, read through values that are unit vectors."""
    q = torch.zeros(batch, queries, heads, 8, device=device)
    k = torch.zeros(batch, keys, heads, 8, device=device)
    v = torch.eye(keys, device=device)[None, :, None].expand(batch, keys, heads, keys)
    return inlay.attention(q, k, v, dropout_p=p, **options).permute(0, 2, 1, 3)


def test_philox_has_its_published_values():
    """The ten rounds' known answers of the authors' Random123; seven rounds are the same code, ended earlier."""
    import sys

    module = sys.modules[_philox.__module__]
    rounds, module._PHILOX_ROUNDS = module._PHILOX_ROUNDS, 10
    try:
        zero = torch.zeros(1, dtype=torch.int64)
        words = [int(word) for word in _philox(zero, zero, zero, zero, zero)]
        assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    finally:
        module._PHILOX_ROUNDS = rounds


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p, device):
    """Within four standard deviations; what is kept makes up for it."""
    torch.manual_seed(5)
    values = kept(device, p, batch=4, queries=128)
    count = values.numel()
    actual = dropout_threshold(p) / 65536
    dropped = (values == 0).double().mean().item()
    assert abs(dropped - actual) <= 4 * (actual * (1 - actual) / count) ** 0.5
    torch.testing.assert_close(values[values > 0], torch.full_like(values[values > 0], 1 / 96 / (1 - actual)))


def test_choices_are_not_alike(device):
    """Of neighbouring queries, keys, heads, rows and seeds: as often alike as chance has it."""
    torch.manual_seed(5)
    drops = kept(device, 0.5, batch=2) == 0
    torch.manual_seed(6)
    others = kept(device, 0.5, batch=2) == 0
    pairs = {
        "seeds": (drops, others),
        "rows": (drops[0], drops[1]),
        "heads": (drops[:, 0], drops[:, 1]),
        "queries": (drops[:, :, 1:], drops[:, :, :-1]),
        **{f"keys {n} apart": (drops[..., n:], drops[..., :-n]) for n in (1, 2, 8, 16, 32, 64)},
    }
    for what, (first, second) in pairs.items():
        alike = (first == second).double()
        assert abs(alike.mean().item() - 0.5) <= 4 * 0.5 / alike.numel() ** 0.5, what


def test_the_seed_is_torchs(device):
    torch.manual_seed(5)
    first, second = (kept(device, 0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert_same_bits(kept(device, 0.3), first, "after the same seed")


def test_without_dropout_the_generator_stays_as_it_is():
    state = torch.get_rng_state()
    case = Case()
    inlay.attention(**case.inputs(torch.float32))
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    tensors = case.inputs(torch.float32)
    torch.set_rng_state(state)
    inlay.attention(**tensors)
    assert torch.equal(torch.rand(1), expected)


def test_packed_sequences_draw_as_rows_do(device):
    """A choice knows its sequence's number, and counts queries and keys from the sequence's first."""
    torch.manual_seed(5)
    rows = kept(device, 0.4, batch=2, queries=40, keys=40)
    torch.manual_seed(5)
    cu = torch.tensor([0, 40, 80], device=device)
    packed = kept(device, 0.4, queries=80, keys=80, cu_seqlens_q=cu)
    for row in range(2):
        part = slice(40 * row, 40 * row + 40)
        assert torch.equal(packed[0, :, part, part] == 0, rows[row] == 0)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_the_same_choices_as_the_reference(case, device):
    tensors = case.inputs(torch.float32, device)
    y, _ = case.run(inlay, tensors, dropout_p=0.7)
    expected, _ = case.run(reference, tensors, dropout_p=0.7)
    torch.testing.assert_close(y, expected)
