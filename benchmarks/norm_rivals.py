"""Other implementations of the norm family, each callable with the same tensors.

An implementation maps an op's name to ``function(tensors, style) -> outputs``; style is "stepwise" (Llama) or
"zero_centred" (Gemma, weight + 1). What cannot be imported is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import inlay

EPS = 1e-6
Tensors = dict[str, Tensor]
Op = Callable[[Tensors, str], object]
Implementation = dict[str, Op]

PACKAGES = ("transformers", "triton", "liger_kernel", "quack-kernels")


def ours() -> Implementation:
    def options(style: str) -> dict:
        return {"weight_offset": 1.0, "rounding": "once"} if style == "zero_centred" else {"rounding": "stepwise"}

    return {
        "rms_norm": lambda t, style: inlay.rms_norm(t["x"], t["weight"], eps=EPS, **options(style)),
        "add_rms_norm": lambda t, style: inlay.add_rms_norm(
            t["x"], t["residual"], t["weight"], eps=EPS, **options(style)
        ),
        "gated_rms_norm": lambda t, style: inlay.gated_rms_norm(t["x"], t["gate"], t["weight"], eps=EPS),
        "layer_norm": lambda t, style: inlay.layer_norm(t["x"], t["weight"], t["bias"], eps=EPS),
        "l2_norm": lambda t, style: inlay.l2_norm(t["x"], eps=EPS),
    }


def eager() -> Implementation:
    """Hugging Face's eager code, operation by operation."""

    def rms_norm(x: Tensor, weight: Tensor, style: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        if style == "zero_centred":
            return (wide * (1.0 + weight.float())).to(x.dtype)
        return weight * wide.to(x.dtype)

    def add_rms_norm(t: Tensors, style: str) -> tuple[Tensor, Tensor]:
        residual = t["residual"] + t["x"]
        return rms_norm(residual, t["weight"], style), residual

    def l2_norm(t: Tensors, style: str) -> Tensor:
        wide = t["x"].float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(t["x"].dtype)

    def gated_rms_norm(t: Tensors, style: str) -> Tensor:
        normalised = rms_norm(t["x"], t["weight"], "stepwise")
        return (normalised * F.silu(t["gate"].float())).to(t["x"].dtype)

    return {
        "rms_norm": lambda t, style: rms_norm(t["x"], t["weight"], style),
        "add_rms_norm": add_rms_norm,
        "gated_rms_norm": gated_rms_norm,
        "l2_norm": l2_norm,
    }


def fused_torch() -> Implementation:
    """PyTorch's own kernels. They round once and know no weight offset: they take the sum of both, "scale"."""

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, EPS)

    def add_rms_norm(t: Tensors, style: str) -> tuple[Tensor, Tensor]:
        residual = t["residual"] + t["x"]
        return rms_norm(residual, t["scale"]), residual

    return {
        "rms_norm": lambda t, style: rms_norm(t["x"], t["scale"]),
        "add_rms_norm": add_rms_norm,
        "gated_rms_norm": lambda t, style: rms_norm(t["x"], t["scale"]) * F.silu(t["gate"]),
        "layer_norm": lambda t, style: F.layer_norm(t["x"], t["x"].shape[-1:], t["weight"], t["bias"], EPS),
        "l2_norm": lambda t, style: F.normalize(t["x"], dim=-1),
    }


def compiled() -> Implementation:
    """torch.compile of the eager code, fixed shapes."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # a backward is timed many times on what one forward saved
    ops = eager() | {"layer_norm": fused_torch()["layer_norm"]}
    return {name: torch.compile(op, dynamic=False) for name, op in ops.items()}


def liger() -> Implementation:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # in_place=False: in-place gradients would change dy between the repeats.
    modes = {"stepwise": (0.0, "llama", False), "zero_centred": (1.0, "gemma", False)}
    return {
        "rms_norm": lambda t, style: LigerRMSNormFunction.apply(t["x"], t["weight"], EPS, *modes[style]),
        "add_rms_norm": lambda t, style: LigerFusedAddRMSNormFunction.apply(
            t["x"], t["residual"], t["weight"], EPS, *modes[style]
        ),
        "layer_norm": lambda t, style: LigerLayerNormFunction.apply(t["x"], t["weight"], t["bias"], EPS),
    }


def quack() -> Implementation:
    """Without weight offset: it takes the sum, "scale"."""
    from quack.rmsnorm import rmsnorm

    return {
        "rms_norm": lambda t, style: rmsnorm(t["x"], t["scale"], eps=EPS),
        "add_rms_norm": lambda t, style: rmsnorm(t["x"], t["scale"], residual=t["residual"], eps=EPS, prenorm=True),
    }


# Name: maker and devices. The CPU bars compare with hf_eager.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "hf_eager": (eager, ("cuda", "cpu")),
    "torch": (fused_torch, ("cuda", "cpu")),
    "compile": (compiled, ("cuda",)),
    "liger": (liger, ("cuda",)),
    "quack": (quack, ("cuda",)),
}
