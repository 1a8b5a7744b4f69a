"""The mask function of attn_implementation="inlay", against transformers' sdpa mask: what it makes of each pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.hf import mask_patterns
from inlay.hf.masks import inlay_mask, is_ranges, visible, within_sequences

masking_utils: Any = pytest.importorskip("transformers").masking_utils

B, S = 2, 12
THERE = torch.ones(B, S, dtype=torch.bool)
LEFT, RIGHT, HOLE, EMPTY = (THERE.clone() for _ in range(4))
LEFT[0, :5] = RIGHT[1, 9:] = HOLE[0, 4] = EMPTY[0] = False
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2], [0, 0, 0, 0] + [-1] * 8])
PACKED = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3], [0] * 7 + [1] * 5])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 0], [*range(7), *range(5)]])

causal = masking_utils.causal_mask_function
full = masking_utils.bidirectional_mask_function
window = masking_utils.sliding_window_causal_mask_function
overlay = masking_utils.sliding_window_overlay
block = masking_utils.blockwise_overlay(BLOCKS)
either, both = masking_utils.or_masks, masking_utils.and_masks
packed = masking_utils.packed_sequence_mask_function(PACKED)
chunks = masking_utils.chunked_causal_mask_function


def made(**options: Any) -> tuple[Tensor | None, Tensor]:
    """Inlay's mask, and transformers' [B, 1, Sq, Sk]."""
    arguments = {"batch_size": B, "q_length": S, "kv_length": S, "mask_function": causal, **options}
    arguments["use_vmap"] = bool(options.get("use_vmap"))
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return inlay_mask(**arguments), masking_utils.sdpa_mask(**{**arguments, **skips})


def assert_same(mask: Tensor | None, expected: Tensor) -> None:
    assert isinstance(mask, Tensor)
    seen = visible(mask, expected.shape[3]) if is_ranges(mask) else mask
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "options",
    {
        "causal": {},
        "all there": {"attention_mask": THERE},
        "decoding": {"q_length": 1, "q_offset": S - 1},
        "decoding from a sliding cache": {"q_length": 1, "q_offset": 19, "kv_offset": 8, "mask_function": window(12)},
        "a window of all keys": {"mask_function": window(S), "local_size": S},
        "one chunk": {"mask_function": chunks(S, torch.zeros(B, dtype=torch.int64)), "local_size": S},
        "an encoder": {"mask_function": full, "allow_is_bidirectional_skip": True},
        "an encoder, all there": {
            "mask_function": full, "allow_is_bidirectional_skip": True, "attention_mask": THERE.long(),
        },
    }.items(),
    ids=lambda case: case[0],
)  # fmt: skip
def test_no_mask_where_none_says_the_same(options: tuple[str, dict]) -> None:
    assert made(**options[1])[0] is None


RANGES = {
    "padding on the left": {"attention_mask": LEFT},
    "padding on the right": {"attention_mask": RIGHT},
    "no keys": {"attention_mask": EMPTY},
    "integers": {"attention_mask": LEFT.long()},
    "a longer prompt": {"q_length": 5, "q_offset": 7},
    "a longer prompt, padded": {"q_length": 5, "q_offset": 7, "attention_mask": LEFT},
    "a static cache's first tokens": {"q_length": 5},
    "a static cache": {"q_length": 5, "q_offset": torch.tensor(3)},
    "a static cache, padded": {"q_length": 5, "q_offset": torch.tensor(3), "attention_mask": LEFT[:, :8]},
    "decoding with a static cache": {"q_length": 1, "q_offset": torch.tensor(3), "allow_is_causal_skip": False},
    "window": {"mask_function": window(4), "local_size": 4},
    "window, padded": {"mask_function": window(4), "local_size": 4, "attention_mask": LEFT},
    "window, sliding cache": {
        "mask_function": window(4), "local_size": 4, "q_length": 3, "q_offset": 15, "kv_offset": 12, "kv_length": 6,
        "attention_mask": torch.cat([LEFT, torch.ones(B, 6, dtype=torch.bool)], 1),
    },
    "chunks": {"mask_function": chunks(5, torch.tensor([0, 0])), "local_size": 5},
    "chunks, padded": {"mask_function": chunks(5, torch.tensor([5, 0])), "local_size": 5, "attention_mask": LEFT},
    "chunks, one left in the cache": {
        "mask_function": chunks(5, torch.tensor([0, 2])), "local_size": 5, "q_length": 2, "q_offset": 13,
        "kv_length": 6, "kv_offset": 9,
    },
    "an encoder, padded": {"mask_function": full, "allow_is_bidirectional_skip": True, "attention_mask": RIGHT},
    "an encoder's window": {
        "mask_function": masking_utils.sliding_window_bidirectional_mask_function(3), "local_size": 3,
        "allow_is_bidirectional_skip": True,
    },
    "cross attention": {
        "mask_function": full, "allow_is_bidirectional_skip": True, "q_length": 3, "attention_mask": RIGHT,
    },
    "images": {"mask_function": either(causal, block), "allow_is_causal_skip": False},
    "images, padded": {
        "mask_function": either(causal, block), "allow_is_causal_skip": False, "attention_mask": RIGHT,
    },
    "images within a window": {
        "mask_function": both(either(causal, block), overlay(3)), "allow_is_causal_skip": False, "use_vmap": True,
    },
    "packed": {"mask_function": both(causal, packed), "allow_is_causal_skip": False},
    "packed, window": {"mask_function": both(window(3), packed), "allow_is_causal_skip": False, "local_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("options", RANGES.values(), ids=RANGES.keys())
def test_ranges(options: dict[str, Any]) -> None:
    """8 bytes a query, and not a key more or less is seen."""
    mask, expected = made(**options)
    assert isinstance(mask, Tensor)
    assert is_ranges(mask)
    assert mask.shape == (B, 1, expected.shape[2], 2)
    assert_same(mask, expected)


@pytest.mark.skipif(
    not hasattr(masking_utils, "packed_sequence_compatibility_function"), reason="an older transformers"
)
@pytest.mark.parametrize(
    "inner", [causal, window(2), chunks(3, torch.tensor([0, 0]))], ids=["causal", "window", "chunks"]
)
def test_packed_positions(inner: Any) -> None:
    function = masking_utils.packed_sequence_compatibility_function(inner, POSITIONS, PACKED)
    mask, expected = made(mask_function=function, allow_is_causal_skip=False)
    assert isinstance(mask, Tensor)
    assert is_ranges(mask)
    assert_same(mask, expected)


DENSE = {
    "a hole in the padding": {"attention_mask": HOLE},
    "an image in two parts": {
        "mask_function": either(causal, masking_utils.blockwise_overlay(BLOCKS.masked_fill(BLOCKS == 2, 0))),
        "allow_is_causal_skip": False,
    },
    "a function of someone's own": {
        "mask_function": both(causal, lambda batch, head, query, key: (query + key) % 2 == 0),
        "allow_is_causal_skip": False, "use_vmap": True,
    },
    "asked for, to be combined": {"allow_is_causal_skip": False},
    "asked for, of an encoder": {"mask_function": full, "attention_mask": RIGHT},
}  # fmt: skip


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_other_masks_are_transformers_own(options: dict[str, Any]) -> None:
    mask, expected = made(**options)
    assert isinstance(mask, Tensor)
    assert mask.dtype == torch.bool
    assert_same(mask, expected)


def test_padding_within_an_image_block_counts_for_nothing() -> None:
    """PaliGemma's prefix and its padding on the right have the same number."""
    numbers = torch.tensor([[0] * 5 + [-1] * 4 + [0] * 3, [0] * 6 + [-1] * 6])
    there = numbers.new_ones(B, S).bool()
    there[0, 9:] = False
    function = either(causal, masking_utils.blockwise_overlay(numbers))
    mask, expected = made(mask_function=function, attention_mask=there, allow_is_causal_skip=False)
    assert isinstance(mask, Tensor)
    assert is_ranges(mask)
    assert torch.equal(visible(mask, S)[there[:, None]], expected[there[:, None]])


def test_a_factory_that_makes_something_else_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a release that counts a window otherwise: the mask is then made by transformers."""

    def sliding_window_overlay(sliding_window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    mask_patterns._factories.cache_clear()
    try:
        assert "sliding_window_overlay" not in mask_patterns._factories().values()
        assert "causal_mask_function" in mask_patterns._factories().values()
        mask, expected = made(mask_function=both(sliding_window_overlay(3), causal), local_size=3)
        assert isinstance(mask, Tensor)
        assert mask.dtype == torch.bool
        assert_same(mask, expected)
    finally:
        monkeypatch.undo()
        mask_patterns._factories.cache_clear()


def test_every_factory_is_known() -> None:
    known = set(mask_patterns._factories().values())
    assert known >= {name for name in mask_patterns._SPANS if hasattr(masking_utils, name)}


def test_ranges_within_sequences() -> None:
    ends = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)
    ranges = inlay_mask(1, S, S, mask_function=window(4), local_size=4)
    sequence = torch.searchsorted(ends, torch.arange(S), right=True)
    same = sequence[:, None] == sequence
    assert torch.equal(visible(within_sequences(ranges, S, ends), S)[0, 0], same & visible(ranges, S)[0, 0])
    assert torch.equal(visible(within_sequences(None, S, ends), S)[0, 0], same)


def test_nothing_waits_for_the_device() -> None:
    """Masks that depend on no values, on a device that has none."""
    mask = inlay_mask(B, S, S, mask_function=window(4), local_size=4, device="meta")
    assert isinstance(mask, Tensor)
    assert is_ranges(mask)
    assert mask.device.type == "meta"
