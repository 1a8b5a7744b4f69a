"""Fused C++/CUDA ops for Hugging Face models."""

from inlay._info import Info, info
from inlay.hf.kernels import register_kernels
from inlay.hf.patch import patch, patched, report, unpatch
from inlay.hf.registry import register_when_imported as _register_when_imported
from inlay.ops._key_ranges import key_ranges
from inlay.ops._moe_losses import (
    load_balancing_loss,
    router_z_loss,
    sequence_balance_loss,
    update_router_bias,
)
from inlay.ops._router_monitor import RouterMonitor, router_stats
from inlay.ops.attention import attention
from inlay.ops.conv import causal_conv1d, causal_conv1d_step
from inlay.ops.gdn import gated_delta_rule, gated_delta_step, gdn_gates, gdn_layer_step
from inlay.ops.moe import moe_experts, moe_experts_permuted, moe_router
from inlay.ops.norm import add_rms_norm, gated_rms_norm, l2_norm, layer_norm, rms_norm
from inlay.ops.rope import qk_norm_rope
from inlay.reference.moe import RouterStats

__all__ = [
    "Info",
    "RouterMonitor",
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
    "info",
    "key_ranges",
    "l2_norm",
    "layer_norm",
    "load_balancing_loss",
    "moe_experts",
    "moe_experts_permuted",
    "moe_router",
    "patch",
    "patched",
    "qk_norm_rope",
    "register_kernels",
    "report",
    "rms_norm",
    "router_stats",
    "router_z_loss",
    "sequence_balance_loss",
    "unpatch",
    "update_router_bias",
]

_register_when_imported()
