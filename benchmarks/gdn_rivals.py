"""Other implementations of the gdn family, each callable with the same tensors.

An implementation maps an op's name to ``function(tensors) -> outputs``; tensors are named as our public functions'
arguments. Forwards of the rule return the final state too. Where tensors must be laid out or scaled in another way
first, the function is ``Converted``, and only what comes after the conversion is timed. What cannot be imported is
absent, with the reason.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import inlay

Tensors = dict[str, Tensor]
Op = Callable[[Tensors], object]


@dataclass(frozen=True)
class Converted:
    """A forward on tensors of its own."""

    convert: Callable[[Tensors], Tensors]
    function: Op


Implementation = Mapping[str, Op | Converted]

PACKAGES = (
    "transformers",
    "triton",
    "flash-linear-attention",
    "flash-qla",
    "tilelang",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
)
INPUTS = ("q", "k", "v", "g", "beta")


def layer_key_heads(t: Tensors) -> int:
    """Of the tensors of a layer's step, which all but say it."""
    value_heads, key_dim, value_dim = t["state"].shape[1:]
    return (t["mixed_qkv"].shape[-1] - value_heads * value_dim) // (2 * key_dim)


def ours() -> Implementation:
    return {
        "gdn_gates": lambda t: inlay.gdn_gates(t["a"], t["b"], t["A_log"], t["dt_bias"]),
        "gated_delta_rule": lambda t: inlay.gated_delta_rule(
            *(t[name] for name in INPUTS), l2norm_qk=True, output_final_state=True
        ),
        "gated_delta_step": lambda t: inlay.gated_delta_step(*(t[name] for name in INPUTS), t["state"], l2norm_qk=True),
        "gdn_layer_step": lambda t: inlay.gdn_layer_step(**t, conv_bias=None, key_heads=layer_key_heads(t)),
    }


def eager() -> Implementation:
    """Hugging Face's own functions, without the kernels that its wrappers may put in their place."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    chunk = _grouped(inspect.unwrap(modeling.torch_chunk_gated_delta_rule))
    recurrent = _grouped(inspect.unwrap(modeling.torch_recurrent_gated_delta_rule))

    def rule(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return chunk(q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

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


def _grouped(function: Callable) -> Callable:
    """The rule, with q and k repeated for the value heads that share them, as older releases' layers do for it."""
    q, v, g = (torch.ones(sizes) for sizes in ((1, 1, 2, 8), (1, 1, 4, 8), (1, 1, 4)))
    constants = {"initial_state": None, "output_final_state": False}
    try:
        function(q, q, v, g=g, beta=g, **constants)
    except RuntimeError:

        def repeated(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
            group = v.shape[2] // k.shape[2]
            return function(q.repeat_interleave(group, 2), k.repeat_interleave(group, 2), v, **options)

        return repeated
    return function


def fla() -> Implementation:
    """Its own Triton kernels, not FlashQLA's, which it calls where that is installed.

    On Hopper with Triton 3.4 to 3.7.0 the backward needs TileLang, and raises without.
    """
    os.environ["FLA_FLASH_QLA"] = "0"
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    def step(t: Tensors) -> Tensor:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=t["state"], output_final_state=True, use_qk_l2norm_in_kernel=True
        )[0]

    return {"gated_delta_rule": _chunked(chunk_gated_delta_rule), "gated_delta_step": step}


def flash_qla() -> Implementation:
    """TileLang kernels, compiled at run time; the backward is one of them."""
    from flash_qla import chunk_gated_delta_rule

    return {"gated_delta_rule": _chunked(chunk_gated_delta_rule)}


def _chunked(function: Callable) -> Op:
    def rule(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (t[name] for name in INPUTS)
        return function(q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return rule


def flashinfer() -> Implementation:
    """CuTe DSL kernels, compiled at run time, without a backward. Decoding is on states as ours are.

    The rule takes packed sequences, decays instead of their logarithms and beta in float32, and gives transposed
    states; one step takes what the gates are made from, and makes them.
    """
    from flashinfer.gdn_decode import gated_delta_rule_decode
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    # Older releases take the flag and do not read it: there, normalising is outside what is timed.
    normalises = importlib.util.find_spec("flashinfer.gdn_kernels.qk_l2norm") is not None

    def packed(t: Tensors) -> Tensors:
        batch, tokens = t["q"].shape[:2]
        ends = torch.arange(batch + 1, device=t["q"].device) * tokens
        q, k = (t[name] if normalises else inlay.l2_norm(t[name]) for name in ("q", "k"))
        rows = {"q": q, "k": k, "v": t["v"], "g": t["g"].exp(), "beta": t["beta"].float()}
        return {"cu_seqlens": ends, **{name: x.flatten(0, 1).contiguous() for name, x in rows.items()}}

    def rule(t: Tensors) -> tuple[Tensor, Tensor]:
        sequences = t["cu_seqlens"].shape[0] - 1
        o, state = chunk_gated_delta_rule(
            **t, output_final_state=True, use_qk_l2norm_in_kernel=normalises, max_seqlen=t["q"].shape[0] // sequences
        )
        return o.unflatten(0, (sequences, -1)), state.mT

    return {"gated_delta_rule": Converted(packed, rule), **_flashinfer_step(gated_delta_rule_decode, lambda s: s)}


def flashinfer_transposed() -> Implementation:
    """Decoding on transposed states, [V, K], which no model's cache in transformers holds."""
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose

    return _flashinfer_step(gated_delta_rule_decode_pretranspose, lambda state: state.mT.contiguous())


def _flashinfer_step(function: Callable, layout: Callable[[Tensor], Tensor]) -> Implementation:
    def convert(t: Tensors) -> Tensors:
        heads = torch.zeros(t["v"].shape[2], device=t["v"].device)
        a = torch.expm1(-t["g"]).log().to(t["q"].dtype)  # softplus(a) is -g
        return {**{name: t[name] for name in "qkv"}, "a": a, "b": t["beta"].float().logit().to(t["q"].dtype),
                "A_log": heads, "dt_bias": heads.clone(), "state": layout(t["state"])}  # fmt: skip

    return {"gated_delta_step": Converted(convert, lambda t: function(**t, use_qk_l2norm=True)[0])}


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
    "flash_qla": (flash_qla, ("cuda",)),
    "flashinfer": (flashinfer, ("cuda",)),
    "flashinfer_vk": (flashinfer_transposed, ("cuda",)),
}
