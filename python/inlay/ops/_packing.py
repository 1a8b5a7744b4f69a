"""Where packed sequences begin and end, from other ways to say it."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_offsets(seq_idx: Tensor) -> Tensor:
    """``cu_seqlens`` of all batch rows' tokens one after another, made on their device.

    How many sequences there are is known there alone, so there is room for one a token; those that do not exist are
    empty and lie at the end.

    Args:
        seq_idx: [B, T], an integer a token: a sequence starts with each row, and wherever the integer differs from the
            token before.

    Returns:
        [B T + 2], int64.
    """
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    tokens = torch.arange(starts.numel(), device=seq_idx.device)
    sequences = starts.flatten().cumsum(0) - 1  # of each token
    offsets = torch.full((starts.numel() + 2,), starts.numel(), device=seq_idx.device)
    return offsets.scatter_reduce(0, sequences, tokens, "amin")
