"""Attention in eager PyTorch. See ``inlay.ops.attention`` for what each argument means.

It makes the whole matrix of scores, [B, Hq, Sq, Sk], and one visibility mask of everything that hides keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_ROUNDS = 7
_DROPOUT_STEPS = 65536


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    queries = _Places(cu_seqlens_q, q)
    keys = _Places(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, k)
    visible = _visible(queries, keys, causal, window, kv_lengths, key_ranges)
    if mask is not None:
        visible = visible & mask

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // max(1, k.shape[2])
    # What lies behind the last key of a row may be anything, NaN too.
    there = None if kv_lengths is None else _below(kv_lengths, k.shape[1])[:, :, None, None]
    queries_, keys_, values = (x.transpose(1, 2).to(wide) for x in (q, _zero_unless(there, k), _zero_unless(there, v)))
    keys_, values = (x.repeat_interleave(group, 1) for x in (keys_, values))
    scores = queries_ @ keys_.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~visible, -torch.inf)

    # A sink is one more key, without a value; without sinks it is one that nobody sees.
    sink = scores.new_full((q.shape[2],), -torch.inf) if sinks is None else sinks.to(wide)
    logits = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
    blind = logits.isneginf().all(-1)
    lse = logits.masked_fill(blind[..., None], 0.0).logsumexp(-1)
    probabilities = torch.exp(scores - lse[..., None])
    lse = lse.masked_fill(blind, -torch.inf)
    if dropout_p > 0:
        probabilities = probabilities * _dropout(dropout_p, probabilities, queries, keys)
    y = (probabilities @ values).transpose(1, 2)
    if gate is not None:
        y = y * torch.sigmoid(gate.to(wide))
    y = y.to(q.dtype, memory_format=torch.contiguous_format)
    return (y, lse) if return_lse else y


class _Places:
    """Of each token of [B, S, ...]: its sequence's number, its place in it, and the sequence's length; [B or 1, S]."""

    def __init__(self, cu_seqlens: Tensor | None, x: Tensor) -> None:
        tokens = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is None:
            self.sequence = torch.arange(x.shape[0], device=x.device)[:, None]
            self.place, self.length = tokens[None], torch.full((1, 1), x.shape[1], device=x.device)
            return
        ends = cu_seqlens.long()
        sequence = torch.searchsorted(ends, tokens, right=True) - 1  # empty sequences have no token
        self.sequence = sequence[None]
        self.place, self.length = (tokens - ends[sequence])[None], ends.diff()[None]

    def length_of(self, sequence: Tensor) -> Tensor:
        return self.length if self.length.shape[1] == 1 else self.length[0][sequence]


def _visible(
    queries: _Places,
    keys: _Places,
    causal: bool,
    window: tuple[int | None, int | None],
    kv_lengths: Tensor | None,
    key_ranges: Tensor | None,
) -> Tensor:
    """[B or 1, 1, Sq, Sk]: the keys that a query may see as far as positions say."""
    # The place among its sequence's keys that a query stands at: the last one stands at the last.
    at = queries.place + keys.length_of(queries.sequence) - queries.length_of(queries.sequence)
    at, key = at[:, :, None], keys.place[:, None]
    visible = queries.sequence[:, :, None] == keys.sequence[:, None]
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None:
        visible = visible & (key >= at - left)
    if right is not None:
        visible = visible & (key <= at + right)
    if kv_lengths is not None:
        visible = visible & _below(kv_lengths, key.shape[2])[:, None]
    if key_ranges is not None:
        visible = visible & (key >= key_ranges[..., :1]) & (key < key_ranges[..., 1:])
    return visible.expand(-1, at.shape[1], key.shape[2])[:, None]


def _below(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _zero_unless(condition: Tensor | None, x: Tensor) -> Tensor:
    return x if condition is None else x.masked_fill(~condition, 0.0)


def _dropout(p: float, probabilities: Tensor, queries: _Places, keys: _Places) -> Tensor:
    """What to multiply probabilities by: 0, or what makes up for it; drawn as csrc/attention/dropout.h says."""
    threshold = dropout_threshold(p)
    seed = dropout_seed(probabilities.device)
    head = torch.arange(probabilities.shape[1], device=seed.device)[:, None, None]
    key = keys.place[:, None, None]
    words = _philox(
        seed, (key >> 5) * 4 + (key >> 1) % 4, queries.place[:, None, :, None], head,
        queries.sequence[:, None, :, None],
    )  # fmt: skip
    choice = ((key >> 3) % 4).expand(words[0].shape)
    word = torch.stack(words).gather(0, choice[None])[0]
    kept = (word >> (key % 2 * 16)) % _DROPOUT_STEPS >= threshold
    return kept * (_DROPOUT_STEPS / (_DROPOUT_STEPS - threshold))


def dropout_threshold(p: float) -> int:
    """Of 65536: the smallest number that is kept."""
    return min(round(p * _DROPOUT_STEPS), _DROPOUT_STEPS - 1)


def dropout_seed(device: torch.device) -> Tensor:
    """[1], from torch's generator of the device: ``torch.manual_seed`` reproduces it, and checkpoints restore it."""
    return torch.randint(2**62, (1,), device=device)


def _philox(seed: Tensor, *counters: Tensor) -> list[Tensor]:
    """Philox 4x32: four 32-bit words, as int64, for counters that are broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, which keeps all the bits
        c0, c1, c2, c3 = (
            (product1 >> 32) & low ^ c1 ^ key0,
            product1 & low,
            (product0 >> 32) & low ^ c3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]
