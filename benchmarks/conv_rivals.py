"""Other implementations of the conv family, each callable with the same tensors.

An implementation maps an op's name to ``function(tensors) -> output``: "causal_conv1d" and "packed" take x [B, T, C]
and the weight, "causal_conv1d_step" a state [B, C, W] as well, which it updates. What cannot be imported is absent,
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import inlay

Tensors = dict[str, Tensor]
Op = Callable[[Tensors], Tensor]
Implementation = dict[str, Op]

PACKAGES = ("transformers", "triton", "causal_conv1d")


def ours() -> Implementation:
    def packed(t: Tensors) -> Tensor:
        return inlay.causal_conv1d(t["x"], t["weight"], activation="silu", cu_seqlens=t["cu_seqlens"])

    return {
        "causal_conv1d": lambda t: inlay.causal_conv1d(t["x"], t["weight"], activation="silu"),
        "packed": packed,
        "causal_conv1d_step": lambda t: inlay.causal_conv1d_step(t["x"], t["state"], t["weight"], activation="silu"),
    }


def eager() -> Implementation:
    """Hugging Face's eager code, operation by operation. It cannot keep packed sequences apart."""

    def convolve(t: Tensors) -> Tensor:
        x, weight = t["x"].transpose(1, 2), t["weight"]
        y = F.conv1d(x, weight.unsqueeze(1), padding=weight.shape[1] - 1, groups=x.shape[1])
        return F.silu(y[..., : x.shape[2]]).transpose(1, 2)

    def step(t: Tensors) -> Tensor:
        x, state, weight = t["x"].transpose(1, 2), t["state"], t["weight"]
        inputs = torch.cat([state, x], dim=-1)
        state.copy_(inputs[..., -state.shape[-1] :])
        y = F.conv1d(inputs, weight.unsqueeze(1), groups=x.shape[1])
        return F.silu(y[..., -x.shape[2] :]).transpose(1, 2)

    return {"causal_conv1d": convolve, "causal_conv1d_step": step}


def compiled() -> Implementation:
    """torch.compile of the eager code, fixed shapes."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # a backward is timed many times on what one forward saved
    return {name: torch.compile(op, dynamic=False) for name, op in eager().items()}


def package() -> Implementation:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    def convolve(t: Tensors, **options: Tensor) -> Tensor:
        return causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], activation="silu", **options).transpose(1, 2)

    def step(t: Tensors) -> Tensor:
        return causal_conv1d_update(t["x"].transpose(1, 2), t["state"], t["weight"], activation="silu").transpose(1, 2)

    return {
        "causal_conv1d": convolve,
        "packed": lambda t: convolve(t, seq_idx=t["seq_idx"]),
        "causal_conv1d_step": step,
    }


# Name: maker and devices. The CPU bars compare with hf_eager.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "hf_eager": (eager, ("cuda", "cpu")),
    "compile": (compiled, ("cuda",)),
    "causal_conv1d": (package, ("cuda",)),
}
