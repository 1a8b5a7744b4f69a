"""The mask function behind ``attn_implementation="inlay"``: the keys of each query, as one range.

transformers describes a mask by a function of indices and by a padding mask [B, Sk]. Wherever a query's keys lie side
by side, which is nearly always, the mask is their begin and end: int32 [B, 1, Sq, 2], 8 bytes a query, made once for
all layers. It has four dimensions because transformers hands on what has four dimensions as it is. Other masks are bool
[B, 1, Sq, Sk], made by transformers' own function. None means what it means to sdpa: causal attention, aligned to the
first key, for modules that are causal and more than one query; otherwise all keys.

Whether keys lie side by side can depend on values: of a padding mask, of blocks. They are looked at once for each mask,
as sdpa's mask function does (on CUDA that waits for the device); not while a graph is traced or captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.hf import mask_patterns
from inlay.hf.mask_patterns import Pattern, Span, Values
from inlay.hf.norms import is_plain, transform_reason

# transformers asks for no skip of masks with these, whether or not its caller does.
_NEVER_SKIPPED = {"packed_sequence_mask_function", "blockwise_overlay"}


def inlay_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """For transformers' ``AttentionMaskInterface``; the arguments are those of its ``sdpa_mask``."""
    # Not as attributes of their module: torch 2.11 cannot trace the import of a part of transformers' lazy module.
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    compiling = torch.compiler.is_compiling()
    pattern = _traced_pattern(function) if compiling else mask_patterns.read(function)
    can_look = not compiling and _can_look(torch.device(device), attention_mask)
    if pattern is not None and (attention_mask is None or can_look):
        may_skip = allow_is_causal_skip if pattern.is_causal else allow_is_bidirectional_skip
        # A caller who asks for no skip wants to combine the mask with another. So does transformers, for its own
        # reasons: custom functions, packed sequences, blocks, and decoding with a static cache.
        for_transformers = use_vmap or _NEVER_SKIPPED.intersection(pattern.kinds())
        if may_skip or for_transformers or (q_length == 1 and isinstance(q_offset, Tensor)):
            there = None if attention_mask is None else _keys_there(attention_mask.to(device), kv_length, kv_offset)
            if there is not None and bool(there.all()):
                there = None
            if there is None and may_skip and _is_plain(pattern, q_length, kv_length, q_offset, kv_offset):
                return None
            queries = torch.arange(q_length, device=device)[None] + q_offset
            ranges = _ranges(pattern, batch_size, queries, kv_length, kv_offset, attention_mask, there, can_look)
            if ranges is not None:
                return ranges
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip


def is_ranges(mask: Tensor) -> bool:
    """Whether a mask of four dimensions is ranges [B, 1, Sq, 2]."""
    return mask.dtype == torch.int32 and mask.shape[-1] == 2


def visible(ranges: Tensor, keys: int) -> Tensor:
    """Ranges [B, 1, Sq, 2] as a bool mask [B, 1, Sq, keys]."""
    numbers = torch.arange(keys, dtype=torch.int32, device=ranges.device)
    return (numbers >= ranges[..., :1]) & (numbers < ranges[..., 1:])


def within_sequences(ranges: Tensor | None, tokens: int, cu_seqlens: Tensor) -> Tensor:
    """Ranges of one batch row (None: all keys), held within its packed sequences."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    following = torch.searchsorted(cu_seqlens, places, right=True)
    begin, end = cu_seqlens[following - 1], cu_seqlens[following]
    if ranges is not None:
        begin, end = begin.maximum(ranges[0, 0, :, 0]), end.minimum(ranges[0, 0, :, 1])
    return torch.stack([begin, end], -1).to(torch.int32)[None, None]


def _traced_pattern(function: Any) -> Pattern | None:
    """Closures cannot be read in a traced function."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return Pattern("causal_mask_function", {})
    if function is bidirectional_mask_function:
        return Pattern("bidirectional_mask_function", {})
    return None


def _can_look(device: torch.device, attention_mask: Tensor | None) -> bool:
    """Whether there are values to be looked at."""
    return (
        device.type != "meta"
        and (attention_mask is None or is_plain(attention_mask))
        and transform_reason() is None
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _is_plain(pattern: Pattern, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any) -> bool:
    """Whether it is what None says."""
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    if pattern.limit(from_the_start=kv_offset == 0) < kv_length:
        return False
    if not pattern.is_causal:
        return True
    first = q_offset - kv_offset  # which key the first query stands at
    return (first == 0 and q_length == kv_length) or (q_length == 1 and first + 1 == kv_length)


def _keys_there(attention_mask: Tensor, kv_length: int, kv_offset: Any) -> Tensor:
    """[B, kv_length]: which keys are not padding. What lies behind the mask's end is."""
    mask = attention_mask.bool()
    if isinstance(kv_offset, Tensor):
        places = torch.arange(kv_length, device=mask.device) + kv_offset
        return mask[:, places.clamp_max(mask.shape[1] - 1)] & (places < mask.shape[1])
    mask = mask[:, kv_offset : kv_offset + kv_length]
    return torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))


def _ranges(
    pattern: Pattern,
    batch_size: int,
    queries: Tensor,
    kv_length: int,
    kv_offset: Any,
    attention_mask: Tensor | None,
    there: Tensor | None,
    can_look: bool,
) -> Tensor | None:
    """[B, 1, Sq, 2], or None if some query's keys do not lie side by side, or nobody can tell."""
    values = Values(None if attention_mask is None else attention_mask.to(queries.device).bool())
    span = pattern.span(queries, values).moved(-kv_offset)
    if there is not None:
        count = there.sum(1, keepdim=True)
        begin = there.to(torch.uint8).argmax(1, keepdim=True)
        end = kv_length - there.flip(1).to(torch.uint8).argmax(1, keepdim=True)
        end = torch.where(count > 0, end, begin)
        values.conditions.append((end - begin == count).all())
        span = span & Span(begin, end)
    if values.conditions and not (can_look and torch.stack(values.conditions).all()):
        return None
    begin = queries.new_zeros(()) if span.begin is None else span.begin
    end = queries.new_full((), kv_length) if span.end is None else span.end
    shape = (batch_size, queries.shape[1])
    ranges = torch.stack([bound.clamp(0, kv_length).broadcast_to(shape) for bound in (begin, end)], -1)
    return ranges.to(torch.int32)[:, None]
