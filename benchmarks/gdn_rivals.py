"""Other implementations of the gdn family, each callable with the same tensors.

An implementation maps an op's name to ``function(tensors) -> outputs``; tensors are named as our public functions'
arguments. What cannot be imported is absent, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import inlay

Tensors = dict[str, Tensor]
Op = Callable[[Tensors], object]
Implementation = dict[str, Op]

PACKAGES = ("transformers", "triton", "flash-linear-attention")
INPUTS = ("q", "k", "v", "g", "beta")


def layer_key_heads(t: Tensors) -> int:
    """Of the tensors of a layer's step, which all but say it."""
    value_heads, key_dim, value_dim = t["state"].shape[1:]
    return (t["mixed_qkv"].shape[-1] - value_heads * value_dim) // (2 * key_dim)


def ours() -> Implementation:
    return {
        "gdn_gates": lambda t: inlay.gdn_gates(t["a"], t["b"], t["A_log"], t["dt_bias"]),
        "gated_delta_rule": lambda t: inlay.gated_delta_rule(*(t[name] for name in INPUTS), l2norm_qk=True),
        "gated_delta_step": lambda t: inlay.gated_delta_step(*(t[name] for name in INPUTS), t["state"], l2norm_qk=True),
        "gdn_layer_step": lambda t: inlay.gdn_layer_step(**t, conv_bias=None, key_heads=layer_key_heads(t)),
    }


def eager() -> Implementation:
    """Hugging Face's own functions, without the kernels that its wrappers may put in their place."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    chunk = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
    recurrent = inspect.unwrap(modeling.torch_recurrent_gated_delta_rule)

    def rule(t: Tensors) -> Tensor:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return chunk(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    def step(t: Tensors) -> Tensor:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return recurrent(
            q, k, v, g=g, beta=beta, initial_state=t["state"], output_final_state=True, use_qk_l2norm_in_kernel=True
        )[0]

    def gates(t: Tensors) -> tuple[Tensor, Tensor]:
        return -t["A_log"].float().exp() * F.softplus(t["a"].float() + t["dt_bias"]), t["b"].sigmoid()

    update = inspect.unwrap(modeling.causal_conv1d_update)
    norm = modeling.Qwen3_5RMSNormGated(1)

    def layer_step(t: Tensors) -> Tensor:
        """The layer's decoding branch, line by line, without its projections."""
        key_heads, (value_heads, key_dim, value_dim) = layer_key_heads(t), t["state"].shape[1:]
        mixed = update(t["mixed_qkv"].transpose(1, 2), t["conv_state"], t["conv_weight"], None, "silu").transpose(1, 2)
        keys = key_heads * key_dim
        q, k, v = torch.split(mixed, [keys, keys, value_heads * value_dim], dim=-1)
        q, k = (x.unflatten(-1, (key_heads, key_dim)) for x in (q, k))
        beta = t["b"].sigmoid()
        g = -t["A_log"].float().exp() * F.softplus(t["a"].float() + t["dt_bias"])
        o, state = recurrent(
            q, k, v.unflatten(-1, (value_heads, value_dim)), g=g, beta=beta, initial_state=t["state"],
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        t["state"].copy_(state)
        norm.weight.data = t["norm_weight"]
        return norm(o, t["z"])

    return {"gdn_gates": gates, "gated_delta_rule": rule, "gated_delta_step": step, "gdn_layer_step": layer_step}


def fla() -> Implementation:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    def rule(t: Tensors) -> Tensor:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    def step(t: Tensors) -> Tensor:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=t["state"], output_final_state=True, use_qk_l2norm_in_kernel=True
        )[0]

    return {"gated_delta_rule": rule, "gated_delta_step": step}


def compiled() -> Implementation:
    """torch.compile of the eager step, fixed shapes; the chunked form takes minutes to compile."""
    ops = eager()
    return {name: torch.compile(ops[name], dynamic=False) for name in ("gdn_gates", "gated_delta_step")}


# Name: maker and devices.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "hf_eager": (eager, ("cuda", "cpu")),
    "compile": (compiled, ("cuda",)),
    "fla": (fla, ("cuda",)),
}
