"""Other implementations of the rope family, each callable with the same tensors.

An implementation maps an op's name to ``function(tensors, style) -> (q, k)``, both [B, S, H, D] in any order of memory;
style is one of ``STYLES``. What cannot be imported, or does not know a style, is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor

import inlay

EPS = 1e-6
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Style:
    """How a model family norms and rotates its heads."""

    norm: bool = True
    zero_centred: bool = False  # the weight is added to one, and the norm rounded once
    rotary: int = 1  # one in so many channels is rotated
    gated: bool = False  # each query lies beside a gate
    interleaved: bool = False

    def options(self) -> dict:
        norm = {"rounding": "once", "weight_offset": 1.0} if self.zero_centred else {}
        return {"eps": EPS, "interleaved": self.interleaved, **norm}


STYLES = {
    "qwen3": Style(),
    "qwen3.5": Style(zero_centred=True, rotary=4, gated=True),
    "llama": Style(norm=False),
    "glm": Style(norm=False, rotary=2, interleaved=True),
}
Op = Callable[[Tensors, str], tuple[Tensor, Tensor]]
Implementation = dict[str, Op]

PACKAGES = ("transformers", "triton", "liger_kernel")


def ours() -> Implementation:
    def qk_norm_rope(t: Tensors, style: str) -> tuple[Tensor, Tensor]:
        weights = t.get("q_weight"), t.get("k_weight")
        return inlay.qk_norm_rope(t["q"], t["k"], t["cos"], t["sin"], *weights, **STYLES[style].options())

    return {"qk_norm_rope": qk_norm_rope}


def eager() -> Implementation:
    """Hugging Face's eager code, operation by operation."""

    def norm(x: Tensor, weight: Tensor, style: Style) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        if style.zero_centred:
            return (wide * (1.0 + weight.float())).to(x.dtype)
        return weight * wide.to(x.dtype)

    def partners(x: Tensor, interleaved: bool) -> Tensor:
        if interleaved:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    def qk_norm_rope(t: Tensors, name: str) -> tuple[Tensor, Tensor]:
        style = STYLES[name]
        cos, sin = t["cos"].unsqueeze(1), t["sin"].unsqueeze(1)
        rotary = cos.shape[-1]

        def norm_and_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
            x = (x if weight is None else norm(x, weight, style)).transpose(1, 2)
            rotated, passed = x[..., :rotary], x[..., rotary:]
            y = rotated * cos + partners(rotated, style.interleaved) * sin
            return (torch.cat([y, passed], dim=-1) if passed.shape[-1] else y).transpose(1, 2)

        return norm_and_rotate(t["q"], t.get("q_weight")), norm_and_rotate(t["k"], t.get("k_weight"))

    return {"qk_norm_rope": qk_norm_rope}


def compiled() -> Implementation:
    """torch.compile of the eager code, fixed shapes."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # a backward is timed many times on what one forward saved
    return {name: torch.compile(op, dynamic=False) for name, op in eager().items()}


def liger() -> Implementation:
    """Liger's norm, then its rotary embedding, which works in place: without a norm it is given a copy."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def qk_norm_rope(t: Tensors, name: str) -> tuple[Tensor, Tensor]:
        style = STYLES[name]
        if style.rotary > 1 or style.interleaved:
            raise NotImplementedError("no partial and no interleaved rotation")

        def norm(x: Tensor, weight: Tensor | None) -> Tensor:
            if weight is None:
                return x.clone()
            return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

        q, k = (norm(t[name], t.get(f"{name}_weight")).transpose(1, 2) for name in "qk")
        q, k = LigerRopeFunction.apply(q, k, t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return {"qk_norm_rope": qk_norm_rope}


# Name: maker and devices. The CPU bars compare with hf_eager.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "hf_eager": (eager, ("cuda", "cpu")),
    "compile": (compiled, ("cuda",)),
    "liger": (liger, ("cuda",)),
}
