"""The forward that whole Gated DeltaNet layers are patched with, and when it leaves a call to the layer's own code.

The layers of transformers' Qwen3-Next, Qwen3.5 and Qwen3.5-MoE, and any other that :mod:`inlay.hf.gdn_recognise` finds
to compute the same; :mod:`inlay.hf.gdn_layer` is the computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.hf import gdn_layer
from inlay.hf.binding import Plan, binding_of
from inlay.hf.gdn_recognise import GdnSpec, recognise
from inlay.hf.norms import device_reason, is_plain, transform_reason

OPS = ("gdn_layer",)

_STATE_DTYPES = (torch.float32, torch.bfloat16)


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a Gated DeltaNet layer; why not, for a module that looks like one; None for any other."""
    spec = recognise(module)
    return Plan("gdn_layer", forward, spec) if isinstance(spec, GdnSpec) else spec


def forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    binding = binding_of(self)
    if binding is None:
        return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    # The convolution's weight is used, but the module never called: accelerate, which brings offloaded weights in for
    # calls, has to be told. The layer's own forward does the same.
    hook = getattr(self.conv1d, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(self.conv1d)
    reason = _reason(self, hidden_states, cache_params, kwargs)
    if reason is None:
        y = gdn_layer.run(self, binding.plan.spec, hidden_states, cache_params, attention_mask, _packing(kwargs))
    if hook is not None:
        hook.post_forward(self.conv1d, ())
    if reason is not None:
        binding.count_fallback(reason)
        return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    binding.count_call(y.device)
    return y


def _packing(kwargs: dict[str, Any]) -> gdn_layer.Packing:
    return gdn_layer.Packing(kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))


def _reason(layer: Any, x: Tensor, cache: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the layer's own code has to compute this call, or None. Asked before anything is computed or written."""
    if not is_plain(x):
        return f"x is a {type(x).__name__}"
    for vector in (layer.conv1d.weight, layer.conv1d.bias, layer.A_log, layer.dt_bias):
        if vector is None:
            continue
        if not is_plain(vector):
            return f"a weight is a {type(vector).__name__}"
        if vector.device != x.device:
            return f"a weight is on {vector.device.type}, x on {x.device.type}"
    if x.dim() != 3:
        return f"x has {x.dim()} dimensions, not 3"
    if torch.float64 in (x.dtype, layer.conv1d.weight.dtype, layer.A_log.dtype):
        return "no op rounds as it does for float64"
    packing = _packing(kwargs)
    packed = packing.cu_seq_lens_q is not None or packing.seq_idx is not None  # a comparison of tuples misleads Dynamo
    return (
        device_reason(x)
        or transform_reason()
        or _packing_reason(packing, x, cache)
        or _cache_reason(layer, x, cache, packed)
    )


def _packing_reason(packing: gdn_layer.Packing, x: Tensor, cache: Any) -> str | None:
    if packing.cu_seq_lens_q is not None:
        return None if x.shape[0] == 1 else "cu_seq_lens_q is given for more than one batch row"
    if packing.seq_idx is None:
        return None
    if packing.seq_idx.shape != x.shape[:2]:
        return f"seq_idx is {list(packing.seq_idx.shape)} for {list(x.shape[:2])} tokens"
    if cache is not None:
        # Which of the packed sequences the cache would go on with is known on the device alone.
        return "seq_idx is given without cu_seq_lens_q, and with a cache"
    return None


def _cache_reason(layer: Any, x: Tensor, cache: Any, packed: bool) -> str | None:
    if cache is None:
        return None
    layers = getattr(cache, "layers", ())
    if layer.layer_idx >= len(layers) or not hasattr(layers[layer.layer_idx], "has_previous_state"):
        return "the cache has no states for this layer"
    if getattr(layers[layer.layer_idx], "record_past", False):
        return "the cache records past states"
    states = gdn_layer.states_in(cache, layer.layer_idx)
    if states is None:
        return None
    if packed:
        return "packed sequences go on with a cache"
    conv, recurrent = states
    if not (is_plain(conv) and is_plain(recurrent)):
        return "a cached state is no plain tensor"
    if conv.device != x.device or recurrent.device != x.device:
        return "a cached state is on another device"
    if conv.shape[0] != x.shape[0] or recurrent.shape[0] != x.shape[0]:
        return "the cached states are of another batch size"
    if recurrent.dtype not in _STATE_DTYPES:
        return f"the cached state is {str(recurrent.dtype).removeprefix('torch.')}"
    return None if recurrent.is_contiguous() else "the cached state is not contiguous"
