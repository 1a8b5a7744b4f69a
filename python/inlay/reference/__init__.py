"""Eager PyTorch definitions of every Inlay op: the oracle of the tests and the fallback of the patches.

Each function has the public op's signature, runs on any device and in any dtype up to float64, is
differentiable by autograd, and imports nothing from ``inlay.ops``.
"""

from inlay.reference.attention import attention
from inlay.reference.conv import causal_conv1d, causal_conv1d_step
from inlay.reference.gdn import gated_delta_rule, gated_delta_step, gdn_gates, gdn_layer_step
from inlay.reference.moe import RouterStats, moe_experts, moe_experts_permuted, moe_router
from inlay.reference.norm import add_rms_norm, gated_rms_norm, l2_norm, layer_norm, rms_norm
from inlay.reference.rope import qk_norm_rope

__all__ = [
    "RouterStats",
    "add_rms_norm",
    "attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_delta_rule",
    "gated_delta_step",
    "gated_rms_norm",
    "gdn_gates",
    "gdn_layer_step",
    "l2_norm",
    "layer_norm",
    "moe_experts",
    "moe_experts_permuted",
    "moe_router",
    "qk_norm_rope",
    "rms_norm",
]
