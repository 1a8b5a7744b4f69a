"""Which keys each query may see, as one range a query: what ``inlay.attention`` takes as ``key_ranges``."""

from __future__ import annotations

import torch
from torch import Tensor

_OP = "key_ranges"


def key_ranges(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    chunk_size: int | None = None,
    prefix_lengths: Tensor | None = None,
    blocks: Tensor | None = None,
    starts: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Key ranges of the masks that models are made of, to be built once for all layers; nothing waits for the device.

    Query i stands at key ``p = i + keys - queries``. Its range is what ``causal``, ``window`` and ``chunk_size`` leave
    of all keys; a prefix and its own block are then added to it, and padding on the left is taken away.

    Args:
        queries, keys: how many there are.
        causal: nothing after p.
        window: how many keys before and after p, None for all.
        chunk_size: only keys of p's own chunk of so many, counted from ``starts`` (Llama 4).
        prefix_lengths: [B], keys from the first on that every query sees (prefix language models; PaliGemma).
        blocks: [B, queries] of integers: neighbours with the same number above 0 see each other, whatever else holds
            (images in a text: Gemma 3).
        starts: [B], the first key of each row that there is: padding on the left.
        device: of the result, where no tensor says it.

    Returns:
        [B or 1, queries, 2] int32. A range may be empty.

    Raises:
        ValueError: for a tensor of another shape, or sizes below 0.
    """
    if min(queries, keys) < 0 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(
            f"{_OP}: queries and keys must be at least 0 and chunk_size at least 1, got {queries}, {keys}, {chunk_size}"
        )
    tensors = {"prefix_lengths": prefix_lengths, "blocks": blocks, "starts": starts}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = (tensor.shape[0], queries) if name == "blocks" and tensor.dim() else tensor.shape[:1]
        if tensor.dim() == 0 or tensor.shape != shape:
            axes = "B, queries" if name == "blocks" else "B"
            raise ValueError(f"{_OP}: {name} must have shape [{axes}], got {list(tensor.shape)}")
        device = tensor.device
    at = torch.arange(keys - queries, keys, device=device)[None]
    first = torch.zeros_like(at) if starts is None else starts[:, None]
    begin, end = torch.zeros_like(at), torch.full_like(at, keys)
    if causal:
        end = at + 1
    left, right = window
    if left is not None:
        begin = (at - left).clamp(min=0)
    if right is not None:
        end = torch.minimum(end, at + right + 1)
    if chunk_size is not None:
        chunk = (at - first).div(chunk_size, rounding_mode="floor") * chunk_size + first
        begin, end = torch.maximum(begin, chunk), torch.minimum(end, chunk + chunk_size)
    if prefix_lengths is not None:
        end = torch.maximum(end, prefix_lengths[:, None])
    if blocks is not None:
        begin, end = _with_blocks(begin, end, blocks, keys - queries)
    begin, end = torch.broadcast_tensors(torch.maximum(begin, first), end.clamp(max=keys))
    return torch.stack([begin, end], -1).int()


def _with_blocks(begin: Tensor, end: Tensor, blocks: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Each query's range and its block's, which meet at the query's own key."""
    index = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    starts, ends = torch.ones_like(blocks, dtype=torch.bool), torch.ones_like(blocks, dtype=torch.bool)
    starts[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    ends[:, :-1] = starts[:, 1:]
    first = torch.where(starts, index, 0).cummax(1).values + shift
    last = torch.where(ends, index, blocks.shape[1]).flip(1).cummin(1).values.flip(1) + shift
    inside = blocks > 0
    return torch.where(inside, torch.minimum(begin, first), begin), torch.where(
        inside, torch.maximum(end, last + 1), end
    )
