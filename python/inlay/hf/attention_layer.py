"""Whole attention layers with Inlay's ops: projections, norms and rotation, cache, attention with its gate.

The layers of transformers' Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next, Qwen3.5, Gemma 2 and 3, gpt-oss, and
any other that :mod:`inlay.hf.attention_recognise` finds to compute the same:

    q, gate = q_proj(x)                         or q alone; k = k_proj(x), v = v_proj(x)
    q, k    = qk_norm_rope(q, k, cos, sin)      the norms as modules where more belongs to them than their weights
    k, v    = cache.update(k, v)
    y       = o_proj(attention(q, k, v, gate, mask))

The projections are called as modules: a quantised projection, an adapter or a hook does its own work. q, k, v and the
gate are read where the projections have put them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.hf import attention, norms
from inlay.hf.attention_recognise import KEYWORDS, AttentionSpec, Rotation, recognise
from inlay.hf.binding import Change, Plan, binding_of
from inlay.hf.recognise import NormSpec, Setting
from inlay.ops import _checks as checks
from inlay.ops.rope import qk_norm_rope

OPS = ("attention_layer",)

# The names of transformers' own attention implementations, and of those whose masks the layer's forward understands.
_REPLACEABLE = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_IMPLEMENTATIONS = (attention.NAME, "sdpa", "eager")


class Result(NamedTuple):
    """What a layer computes: its output, attention weights or None, and why attention was not the op's, or None."""

    output: Tensor
    weights: Tensor | None
    reason: str | None


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for an attention layer; why not, for a module that looks like one; None for any other."""
    spec = recognise(module)
    if not isinstance(spec, AttentionSpec):
        return spec
    return Plan("attention_layer", forward, spec, _change(module))


def _change(layer: Any) -> Change | None:
    """Has transformers make Inlay's masks: what makes them is named in the configuration, which all layers share."""
    attribute = "_attn_implementation_internal"
    name = getattr(layer.config, attribute, None)
    if name not in _REPLACEABLE or getattr(layer.config, "output_attentions", False):
        return None
    return Change(layer.config, attribute, name, attention.NAME)


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    binding = binding_of(self)
    reason = None
    if binding is not None:
        reason = _reason(self, binding.plan.spec, hidden_states, position_embeddings, attention_mask, kwargs)
        if reason is not None:
            binding.count_fallback(reason)
    if binding is None or reason is not None or position_embeddings is None:
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )  # fmt: skip
    result = run(
        self, binding.plan.spec, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs
    )  # fmt: skip
    if result.reason is None:
        binding.count_call(result.output.device)
    else:
        binding.count_fallback(result.reason)
    return result.output, result.weights


def run(
    layer: Any,
    spec: AttentionSpec,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> Result:
    """The layer's result.

    Args:
        layer: the module.
        hidden_states: [B, S, hidden].
        position_embeddings: cos and sin, [B or 1, S, R].
        attention_mask: as of :func:`inlay.hf.attention.attention_forward`.
        past_key_values: a transformers cache, which is read and updated, or None.
        kwargs: what else the layer was called with.
    """
    shape = (*hidden_states.shape[:-1], -1)
    q, gate = layer.q_proj(hidden_states), None
    if spec.gated:
        q, gate = q.view(*shape, 2 * layer.head_dim).chunk(2, -1)
    else:
        q = q.view(*shape, layer.head_dim)
    k, v = (projection(hidden_states).view(*shape, layer.head_dim) for projection in (layer.k_proj, layer.v_proj))
    q, k = _normed_and_rotated(layer, spec, q, k, *position_embeddings)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, layer.layer_idx)
    keywords = {**kwargs, **{name: getattr(layer, KEYWORDS[name]) for name in spec.keywords}}
    dropout = layer.attention_dropout if layer.training else 0.0
    inputs = attention.inputs_of(layer, q, k, v, attention_mask, dropout, layer.scaling, keywords, gate)
    reason = attention.why_not(layer, inputs, keywords)
    y, weights = attention.fall_back(layer, inputs, keywords) if reason else (attention.compute(inputs), None)
    return Result(layer.o_proj(y.flatten(2)), weights, reason)


def _normed_and_rotated(
    layer: Any, spec: AttentionSpec, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    rotation = _rotation(layer, spec, cos)
    assert rotation is not None
    weights, options = _norm(layer, spec.norms, q, k)
    if not weights and "q_norm" in layer._modules:
        q, k = layer.q_norm(q), layer.k_norm(k)
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    return qk_norm_rope(
        q, k, cos, sin, *weights, **options, rotary_rounding=rotation.rounding.get(q.dtype, "once"),
        rotary_dim=cos.shape[-1] * (2 if rotation.pairs else 1), interleaved=rotation.interleaved,
    )  # fmt: skip


def _rotation(layer: Any, spec: AttentionSpec, cos: Tensor) -> Rotation | None:
    return spec.wide if cos.shape[-1] == layer.head_dim else spec.narrow


def _norm(
    layer: Any, specs: tuple[NormSpec, NormSpec] | None, q: Tensor, k: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Both norms' weights and the options they have, where qk_norm_rope may compute them; otherwise nothing.

    As with a norm that is fused with the residual add, the modules' own counters then do not move: the layer's does.
    """
    if specs is None:
        return (), {}
    weights, settings = [], []
    for norm, spec, x in zip((layer.q_norm, layer.k_norm), specs, (q, k), strict=True):
        if norms.call_reason(norm, spec) is not None:
            return (), {}
        weight, bias = norms.vectors(norm, spec)
        setting = norms.setting_for(spec, x, weight, bias)
        if not isinstance(setting, Setting) or setting.op != "rms_norm" or setting.widen or bias is not None:
            return (), {}
        if weight is None or getattr(norm, spec.eps) is None:
            return (), {}
        weights.append(weight)
        settings.append({"eps": getattr(norm, spec.eps), **setting.options})
    return (tuple(weights), settings[0]) if settings[0] == settings[1] else ((), {})


def _reason(
    layer: Any,
    spec: AttentionSpec,
    x: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the layer's own code has to compute this call, or None. Asked before anything is computed or written."""
    implementation = layer.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"its attention implementation is {implementation}"
    if kwargs.get("cache") is not None:
        return "a paged cache"
    if not norms.is_plain(x):
        return f"x is a {type(x).__name__}"
    if x.dim() != 3:
        return f"x has {x.dim()} dimensions, not 3"
    if mask is not None and mask.dim() != 4:
        return f"a mask of {mask.dim()} dimensions"
    if angles is None:
        return "called without position embeddings"
    return norms.device_reason(x) or norms.transform_reason() or _angle_reason(layer, spec, x, *angles)


def _angle_reason(layer: Any, spec: AttentionSpec, x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if not (norms.is_plain(cos) and norms.is_plain(sin)):
        return f"the position embeddings are a {type(cos).__name__}"
    if cos.device != x.device:
        return f"the position embeddings are on {cos.device.type}, x on {x.device.type}"
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[1]:
        return f"the position embeddings are {list(cos.shape)} for {list(x.shape[:2])} tokens"
    rotation = _rotation(layer, spec, cos)
    width = cos.shape[-1] * (2 if rotation is not None and rotation.pairs else 1)
    if rotation is None or width > layer.head_dim or (rotation.pairs and width != layer.head_dim):
        return f"the position embeddings are {cos.shape[-1]} wide for heads {layer.head_dim} wide"
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
    if dtype not in rotation.rounding or cos.dtype not in ((dtype, torch.float32) if autocast else (dtype,)):
        return f"no op rounds as it does for {checks.names((dtype,))} rotated by {checks.names((cos.dtype,))}"
    if cos.requires_grad or sin.requires_grad:
        return "the position embeddings require gradients"
    return None
