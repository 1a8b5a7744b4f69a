"""Functions of https://github.com/Dao-AILab/flash-attention: ``from inlay.compat.flash_attn import ...``.

Signatures as in its version 2.8. Differences: the CPU works as well, so do float32 (float64 on the CPU) and heads up to
512 wide; a query that sees no key has a logarithm of -inf, not of +inf; alibi slopes are made into a matrix of biases,
which takes memory, and are refused for packed sequences; the probabilities themselves are never returned. The longest
lengths of packed sequences are accepted and have no effect. See :mod:`inlay.ops.attention` for the maths and the other
errors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.ops.attention import attention

Result = Tensor | tuple[Tensor, Tensor, Tensor]

_HEAD_DIM_MULTIPLE = 8


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention.

    Args:
        q: [B, Sq, H, D].
        k, v: [B, Sk, Hkv, D], H a multiple of Hkv.
        dropout_p: the chance of each probability to be dropped.
        softmax_scale: None is ``D ** -0.5``.
        causal: whether a query sees nothing after its own key; the last query stands at the last key.
        window_size: how many keys before and after its own a query sees, -1 for all.
        softcap: 0 for none.
        alibi_slopes: [H] or [B, H] in float32: ``-slope * |i + Sk - Sq - j|`` is added to the scores.
        deterministic: whether gradients have the same bits in every run.
        return_attn_probs: whether to return the logarithms as well.

    Returns:
        o: [B, Sq, H, D]; with ``return_attn_probs`` also the logarithms of the softmax's denominators, [B, H, Sq] in
        float32, and an empty tensor in the place of the probabilities.

    Raises:
        NotImplementedError: for ``return_attn_probs`` with dropout, which asks for the probabilities.
        ValueError: for wrong shapes, dtypes and values, see :mod:`inlay.ops.attention`.
    """
    return _attention(
        "flash_attn_func", q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of kv: [B, Sk, 2, Hkv, D], which is read in place."""
    op = "flash_attn_kvpacked_func"
    k, v = _unpacked(op, "kv", kv, 2)
    return _attention(
        op, q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv: [B, S, 3, H, D], which is read in place."""
    op = "flash_attn_qkvpacked_func"
    q, k, v = _unpacked(op, "qkv", qkv, 3)
    return _attention(
        op, q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """:func:`flash_attn_func` of packed sequences.

    Args:
        q: [all queries, H, D].
        k, v: [all keys, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32, where sequences begin and end. They may be empty.
        max_seqlen_q, max_seqlen_k: without effect.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: as there.
        alibi_slopes, block_table: must be None.

    Returns:
        o: [all queries, H, D]; with ``return_attn_probs`` also the logarithms, [H, all queries], and an empty tensor.

    Raises:
        NotImplementedError: for ``block_table``, keys in pages, and for ``alibi_slopes``.
    """
    op = "flash_attn_varlen_func"
    if block_table is not None:
        raise NotImplementedError(f"{op}: block_table must be None: no keys in pages")
    if alibi_slopes is not None:
        raise NotImplementedError(f"{op}: alibi_slopes must be None: no biases for packed sequences")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.dim() != 3:
            raise ValueError(f"{op}: {name} must have shape [tokens, heads, D], got {list(tensor.shape)}")
    result = _attention(
        op, q[None], k[None], v[None], cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size,
        softcap, None, deterministic, return_attn_probs,
    )  # fmt: skip
    if isinstance(result, Tensor):
        return result[0]
    o, lse, probabilities = result
    return o[0], lse[0], probabilities


def _attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(f"{op}: return_attn_probs must be False with dropout: the probabilities are not kept")
    left, right = window_size
    width, scale = q.shape[-1], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    missing = -width % _HEAD_DIM_MULTIPLE
    if missing:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    result = attention(
        q, k, v, causal=causal, scale=scale, window=(None if left < 0 else left, None if right < 0 else right),
        softcap=softcap, bias=_alibi(op, alibi_slopes, q, k), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p, return_lse=return_attn_probs, deterministic=deterministic or None,
    )  # fmt: skip
    if isinstance(result, Tensor):
        return result[..., :width] if missing else result
    o, lse = result
    return o[..., :width] if missing else o, lse, q.new_empty(0)


def _alibi(op: str, slopes: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    batch, queries, heads = q.shape[:3]
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must have shape [{heads}] or [{batch}, {heads}], got {list(slopes.shape)}"
        )
    at = torch.arange(queries, device=q.device)[:, None] + k.shape[1] - queries
    distance = (at - torch.arange(k.shape[1], device=q.device)).abs()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return -slopes.to(wide).reshape(-1, heads, 1, 1) * distance


def _unpacked(op: str, name: str, packed: Tensor, count: int) -> tuple[Tensor, ...]:
    if packed.dim() != 5 or packed.shape[2] != count:
        raise ValueError(f"{op}: {name} must have shape [B, S, {count}, H, D], got {list(packed.shape)}")
    return packed.unbind(2)
