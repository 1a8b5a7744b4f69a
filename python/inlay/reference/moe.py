"""Mixture of experts in eager PyTorch. See ``inlay.ops.moe`` for what each argument means."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SUM = 1e-20  # what keeps a sum of sigmoids from being zero
_GPT_OSS_ALPHA = 1.702


class RouterStats(NamedTuple):
    """What losses and monitors want to know of a router's choice. All but the logits' own dtype is float32 (float64).

    Attributes:
        counts: [E] int64, how often each expert was chosen by the tokens counted.
        mean_probabilities: [E], the mean over those tokens of the full softmax, or of sigmoids divided by their sum.
        logsumexp: [T], of each token's logits.
        entropy: [T], of each token's probabilities, in nats.
        margin: [T], the smallest score that was chosen less the largest that was not: how near a choice is to flipping.
        max_logit: [T], the largest magnitude among each token's logits.
    """

    counts: Tensor
    mean_probabilities: Tensor
    logsumexp: Tensor
    entropy: Tensor
    margin: Tensor
    max_logit: Tensor


def moe_router(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    renormalize: bool = False,
    groups: tuple[int, int] | None = None,
    scaling: float = 1.0,
    softmax_after_topk: bool = False,
    forced_indices: Tensor | None = None,
    mask: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RouterStats]:
    wide = logits.to(_wide_dtype(logits))
    scores = torch.sigmoid(wide) if scoring == "sigmoid" else torch.softmax(wide, -1)
    choosing = wide if softmax_after_topk else scores
    if bias is not None:
        choosing = choosing + bias.to(choosing.dtype)
    if forced_indices is not None:
        indices = forced_indices.long()
    else:
        if groups is not None and groups[1] < groups[0]:
            choosing = _without_other_groups(choosing, *groups)
        # A stable sort: of equal scores, the lower index comes first.
        indices = torch.sort(choosing, dim=-1, descending=True, stable=True)[1][:, :k]
    if softmax_after_topk:
        weights = torch.softmax(wide.gather(1, indices), -1)
    else:
        weights = scores.gather(1, indices)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
    weights = (weights * scaling).to(wide.dtype if weights_dtype is None else weights_dtype)
    if not stats:
        return weights, indices
    return weights, indices, _statistics(wide, scores, choosing.detach(), indices, scoring, mask)


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    recompute: bool = False,
    num_experts: int | None = None,
) -> Tensor:
    if num_experts not in (None, gate_up_proj.shape[0]):
        raise ValueError(f"moe_experts: num_experts must be {gate_up_proj.shape[0]}, got {num_experts}")
    wide = _wide_dtype(x)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in range(gate_up_proj.shape[0]):

        def run(
            rows: Tensor,
            up: Tensor = gate_up_proj[expert],
            down: Tensor = down_proj[expert],
            up_bias: Tensor | None = None if gate_up_bias is None else gate_up_bias[expert],
            bias: Tensor | None = None if down_bias is None else down_bias[expert],
        ) -> Tensor:
            h = _linear(rows, up, up_bias, transposed)
            return _linear(_activated(h, activation, gated, interleaved, limit), down, bias, transposed).to(wide)

        chosen = indices == expert
        if torch.compiler.is_compiling():  # how many tokens an expert has is not known
            share = torch.where(chosen, weights.to(wide), 0.0).sum(-1, keepdim=True)
            y = y + torch.where(chosen.any(-1, keepdim=True), run(x) * share, 0.0)
        else:
            token, slot = torch.where(chosen)
            y = y.index_add(0, token, run(x[token]) * weights[token, slot, None].to(wide))
    if shared is not None:
        gate = 1.0 if shared_gate is None else torch.sigmoid(shared_gate.to(wide)).reshape(-1, 1)
        y = y + gate * shared.to(wide)
    return y.to(x.dtype)


def moe_experts_permuted(
    x: Tensor,
    ends: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    weights: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    recompute: bool = False,
) -> Tensor:
    # The expert of each row; rows beyond the last end have none.
    row = torch.arange(x.shape[0], device=x.device)
    indices = torch.searchsorted(ends.long(), row, right=True)[:, None]
    if weights is None:
        weights = torch.ones(x.shape[0], dtype=_wide_dtype(x), device=x.device)
    return moe_experts(
        x, indices, weights[:, None], gate_up_proj, down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias,
        activation=activation, gated=gated, interleaved=interleaved, transposed=transposed, limit=limit,
        recompute=recompute,
    )  # fmt: skip


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _without_other_groups(choosing: Tensor, groups: int, chosen_groups: int) -> Tensor:
    """-inf but for the groups whose two highest scores have the largest sums."""
    in_groups = choosing.unflatten(-1, (groups, -1))
    sums = in_groups.topk(2, dim=-1)[0].sum(-1)
    best = torch.sort(sums, dim=-1, descending=True, stable=True)[1][:, :chosen_groups]
    kept = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best, True)
    return in_groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def _statistics(
    logits: Tensor, scores: Tensor, choosing: Tensor, indices: Tensor, scoring: str, mask: Tensor | None
) -> RouterStats:
    probabilities = scores / (scores.sum(-1, keepdim=True) + _LEAST_SUM) if scoring == "sigmoid" else scores
    counted = torch.ones_like(logits[:, 0]) if mask is None else mask.to(logits.dtype)
    chosen = torch.zeros_like(choosing, dtype=torch.bool).scatter(1, indices, True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts = counts.scatter_add(0, indices.flatten(), counted.long().repeat_interleave(indices.shape[1]))
    with torch.no_grad():
        entropy = torch.special.entr(probabilities).sum(-1)
        margin = choosing.gather(1, indices).amin(-1) - choosing.masked_fill(chosen, -torch.inf).amax(-1)
        max_logit = logits.abs().amax(-1)
    mean = (probabilities * counted[:, None]).sum(0) / counted.sum().clamp(min=1)
    return RouterStats(counts, mean, torch.logsumexp(logits, -1), entropy, margin, max_logit)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = F.linear(x, weight.mT if transposed else weight)
    return y if bias is None else (y + bias).to(y.dtype)


def _activated(h: Tensor, activation: str, gated: bool, interleaved: bool, limit: float | None) -> Tensor:
    if not gated:
        return _ACTIVATIONS[activation](h if limit is None else h.clamp(max=limit))
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if activation == "gpt_oss":
        return gate * torch.sigmoid(_GPT_OSS_ALPHA * gate) * (up + 1)
    return _ACTIVATIONS[activation](gate) * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
