"""Losses and rules that keep a router's experts in balance, from what :func:`inlay.moe_router` counts anyway.

None makes a tensor larger than the logits, [T, E].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.ops.moe import moe_router
from inlay.reference.moe import RouterStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Routers = RouterStats | Tensor | Sequence[RouterStats | Tensor]


def load_balancing_loss(
    routers: Routers,
    k: int,
    *,
    attention_mask: Tensor | None = None,
    per_layer: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The auxiliary loss of Switch Transformers: E times the sum over experts of f P.

    f is how many times an expert was chosen, by the number of tokens; P its mean probability. Perfect balance gives k.
    Equal to transformers' ``load_balancing_loss_func`` for the same logits; sources: https://arxiv.org/abs/2101.03961,
    and for f of the global batch https://arxiv.org/abs/2501.11873.

    Args:
        routers: one for each layer: statistics that :func:`inlay.moe_router` has returned, or logits [T, E], of which
            the k largest count as chosen.
        k: experts a token.
        attention_mask: [B, S] or [T]; tokens where it is 0 do not count. For logits alone: statistics have their mask.
        per_layer: the mean of the layers' own losses; else f and P are means over all layers, as transformers has it,
            where imbalances of two layers can hide each other.
        group: a process group whose ranks' counts are added up: f is then of the global batch, and P of the own one.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in logits, or in what gave the statistics.

    Raises:
        ValueError: for no router at all, an attention mask with statistics, or one of another size.
    """
    layers = [_stats_of(router, k, attention_mask) for router in _several("load_balancing_loss", routers)]
    chosen = torch.stack([layer.counts for layer in layers]).to(layers[0].mean_probabilities.dtype)
    probabilities = torch.stack([layer.mean_probabilities for layer in layers])
    tokens = chosen.sum(-1, keepdim=True) / k
    if not per_layer:  # means over all layers' tokens
        probabilities = (probabilities * tokens).sum(0, keepdim=True) / tokens.sum().clamp(min=1)
        chosen, tokens = chosen.sum(0, keepdim=True), tokens.sum(0, keepdim=True)
    if group is not None:
        torch.distributed.all_reduce(chosen, group=group)
        tokens = chosen.sum(-1, keepdim=True) / k
    frequencies = chosen / tokens.clamp(min=1)
    return (frequencies * probabilities).sum(-1).mean() * chosen.shape[-1]


def router_z_loss(routers: Routers, *, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over tokens, and layers, of the squared log of the sum of the exponentials of a token's logits.

    Keeps logits small, so that rounding does not flip choices; it balances nothing. Source:
    https://arxiv.org/abs/2202.08906.

    Args:
        routers: as of :func:`load_balancing_loss`.
        attention_mask: [B, S] or [T]; tokens where it is 0 do not count, of statistics neither.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable as that loss is.

    Raises:
        ValueError: for no router at all, or an attention mask of another size.
    """
    losses = []
    for router in _several("router_z_loss", routers):
        lse = router.logsumexp if isinstance(router, RouterStats) else torch.logsumexp(_wide(router), -1)
        if attention_mask is None:
            losses.append(lse.square().mean())
        else:
            counted = _flat_mask("router_z_loss", attention_mask, lse.shape[0]).to(lse)
            losses.append((lse.square() * counted).sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).mean()


def sequence_balance_loss(
    logits: Tensor, indices: Tensor, *, scoring: str = "sigmoid", attention_mask: Tensor | None = None
) -> Tensor:
    """DeepSeek-V3's balance within each sequence: the mean over sequences of the sum over experts of f P.

    f is E / (k S) times how often the sequence's tokens chose an expert, P the mean of their scores divided by the sum
    over experts. Source: https://arxiv.org/abs/2412.19437, equations 17 to 20 (its factor alpha is left to the caller).

    Args:
        logits: [B, S, E].
        indices: [B, S, K], the experts chosen.
        scoring: "sigmoid" or "softmax".
        attention_mask: [B, S]; tokens where it is 0 do not count.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in logits. Perfect balance gives 1.

    Raises:
        ValueError: for shapes that do not fit, or another scoring.
    """
    op = "sequence_balance_loss"
    if logits.dim() != 3 or indices.dim() != 3 or indices.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"{op}: indices must have shape [B, S, K] for logits [B, S, E], got {list(indices.shape)} for"
            f" {list(logits.shape)}"
        )
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"{op}: scoring must be one of 'sigmoid', 'softmax', got {scoring!r}")
    batch, tokens, experts = logits.shape
    wide = _wide(logits)
    if scoring == "softmax":
        scores = torch.softmax(wide, -1)
    else:
        scores = torch.sigmoid(wide)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    if attention_mask is None:
        counted = wide.new_ones((batch, tokens))
    else:
        counted = _flat_mask(op, attention_mask, batch * tokens).to(wide).view(batch, tokens)
    length = counted.sum(-1, keepdim=True).clamp(min=1)
    chosen = wide.new_zeros((batch, experts))
    chosen = chosen.scatter_add(1, indices.flatten(1), counted.repeat_interleave(indices.shape[2], dim=1))
    frequencies = chosen * (experts / indices.shape[2]) / length
    means = torch.einsum("bse,bs->be", scores, counted) / length
    return (frequencies * means).sum(-1).mean()


@torch.no_grad()
def update_router_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3, group: ProcessGroup | None = None) -> None:
    """Balancing without a loss: experts chosen less often than the mean have their bias raised by ``rate``, others
    lowered, in place. To be called once a step, with the counts of the whole batch.

    Source: https://arxiv.org/abs/2408.15664.

    Args:
        bias: [E], what :func:`inlay.moe_router` takes as ``bias``.
        counts: [E], as in :class:`inlay.RouterStats`; counts of several micro-batches are added up.
        rate: the size of a step.
        group: a process group whose ranks' counts are added up first.

    Raises:
        ValueError: for shapes that differ.
    """
    if bias.dim() != 1 or bias.shape != counts.shape:
        raise ValueError(
            f"update_router_bias: counts must have bias's shape {list(bias.shape)}, got {list(counts.shape)}"
        )
    load = counts.to(torch.float64 if counts.device.type == "cpu" else torch.float32, copy=True)
    if group is not None:
        torch.distributed.all_reduce(load, group=group)
    bias += rate * torch.sign(load.mean() - load).to(bias.dtype)


def _several(op: str, routers: Routers) -> list[RouterStats | Tensor]:
    """RouterStats are a tuple, too."""
    several = [routers] if isinstance(routers, (RouterStats, Tensor)) else list(routers)
    if not several:
        raise ValueError(f"{op}: routers must be of at least one layer, got none")
    return several


def _stats_of(router: RouterStats | Tensor, k: int, attention_mask: Tensor | None) -> RouterStats:
    op = "load_balancing_loss"
    if isinstance(router, RouterStats):
        if attention_mask is not None:
            raise ValueError(f"{op}: attention_mask must be None with statistics, which moe_router takes a mask for")
        return router
    mask = None if attention_mask is None else _flat_mask(op, attention_mask, router.shape[0])
    return moe_router(router, k, mask=mask, stats=True)[2]  # type: ignore[misc]


def _flat_mask(op: str, attention_mask: Tensor, tokens: int) -> Tensor:
    if attention_mask.numel() != tokens:
        raise ValueError(f"{op}: attention_mask must be of {tokens} tokens, got {attention_mask.numel()}")
    return attention_mask.reshape(-1) != 0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
