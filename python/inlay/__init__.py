"""Fused C++/CUDA ops for Hugging Face models."""

from inlay._info import Info, info
from inlay.hf.kernels import register_kernels
from inlay.hf.patch import patch, patched, report, unpatch
from inlay.hf.registry import register_when_imported as _register_when_imported
from inlay.ops._key_ranges import key_ranges
from inlay.ops.attention import attention
from inlay.ops.conv import causal_conv1d, causal_conv1d_step
from inlay.ops.gdn import gated_delta_rule, gated_delta_step, gdn_gates, gdn_layer_step
from inlay.ops.norm import add_rms_norm, gated_rms_norm, l2_norm, layer_norm, rms_norm
from inlay.ops.rope import qk_norm_rope

__all__ = [
    "Info",
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
    "patch",
    "patched",
    "qk_norm_rope",
    "register_kernels",
    "report",
    "rms_norm",
    "unpatch",
]

_register_when_imported()
