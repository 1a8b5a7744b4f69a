"""Other implementations of the MoE family, each callable with the same tensors.

An implementation maps an op's name to a function of tensors and a style, one of ``STYLES``. What cannot be imported, or
does not know a style, is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import inlay

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Style:
    """What a model family has between its experts' projections, and how these are stored."""

    activation: str = "silu"
    interleaved: bool = False
    transposed: bool = False
    limit: float | None = None

    def options(self) -> dict[str, Any]:
        return dict(vars(self))


STYLES = {"qwen": Style(), "gpt_oss": Style("gpt_oss", True, True, 7.0)}
Op = Callable[[Tensors, str], Tensor]
Implementation = dict[str, Op]

PACKAGES = ("transformers",)
_MOST_BATCHED = 128  # tokens times slots


def ours() -> Implementation:
    def experts(t: Tensors, style: str) -> Tensor:
        biases = {name: t[name] for name in ("gate_up_bias", "down_bias") if name in t}
        return inlay.moe_experts(
            t["x"], t["indices"], t["weights"], t["gate_up_proj"], t["down_proj"], **biases, **STYLES[style].options()
        )

    def permuted(t: Tensors, style: str) -> Tensor:
        options = STYLES[style].options()
        return inlay.moe_experts_permuted(t["x"], t["ends"], t["gate_up_proj"], t["down_proj"], **options)

    def router(t: Tensors, style: str) -> Tensor:
        return inlay.moe_router(t["logits"], t["slots"].shape[0], renormalize=True)[0]

    return {"moe_experts": experts, "moe_experts_permuted": permuted, "moe_router": router}


def _module(t: Tensors, style: str) -> Any:
    """What transformers' experts functions ask of a module."""

    def apply_gate(h: Tensor) -> Tensor:
        if style == "gpt_oss":
            gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    biased = "gate_up_bias" in t
    return SimpleNamespace(
        num_experts=t["gate_up_proj"].shape[0], gate_up_proj=t["gate_up_proj"], down_proj=t["down_proj"],
        gate_up_proj_bias=t.get("gate_up_bias"), down_proj_bias=t.get("down_bias"), has_gate=True, has_bias=biased,
        has_post_expert_norm=False, is_transposed=STYLES[style].transposed, is_concatenated=style != "gpt_oss",
        act_fn=F.silu, _apply_gate=apply_gate, _is_expert_parallel=False,
    )  # fmt: skip


def _registered(name: str) -> Implementation:
    """An experts function of transformers, as its models call it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    function = ALL_EXPERTS_FUNCTIONS[name]
    return {"moe_experts": lambda t, style: function(_module(t, style), t["x"], t["indices"], t["weights"])}


def grouped() -> Implementation:
    return _registered("grouped_mm")


def batched() -> Implementation:
    """Copies a matrix for each token and slot, so of few alone."""
    function = _registered("batched_mm")["moe_experts"]

    def experts(t: Tensors, style: str) -> Tensor:
        if t["indices"].numel() > _MOST_BATCHED:
            raise NotImplementedError(f"over {_MOST_BATCHED} copies of an expert")
        return function(t, style)

    return {"moe_experts": experts}


def eager() -> Implementation:
    """A loop over the experts that were chosen, and a router operation by operation."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    forward = MixtralExperts.forward.__wrapped__

    def experts(t: Tensors, style: str) -> Tensor:
        if style != "qwen":
            raise NotImplementedError(f"no eager loop for {style}")
        return forward(_module(t, style), t["x"], t["indices"], t["weights"])

    def router(t: Tensors, style: str) -> Tensor:
        values, _ = torch.topk(F.softmax(t["logits"], dtype=torch.float, dim=-1), t["slots"].shape[0], dim=-1)
        return values / values.sum(dim=-1, keepdim=True)

    return {"moe_experts": experts, "moe_router": router}


def compiled() -> Implementation:
    """torch.compile of the router, fixed shapes."""
    torch._functorch.config.donated_buffer = False  # a backward is timed many times on what one forward saved
    return {"moe_router": torch.compile(eager()["moe_router"], dynamic=False)}


# Name: maker and devices. The CPU bars compare with hf_grouped_mm.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "hf_grouped_mm": (grouped, ("cuda", "cpu")),
    "hf_batched_mm": (batched, ("cuda", "cpu")),
    "hf_eager": (eager, ("cuda", "cpu")),
    "compile": (compiled, ("cuda",)),
}
