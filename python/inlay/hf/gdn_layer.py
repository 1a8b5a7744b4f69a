"""What a Gated DeltaNet layer computes, with Inlay's ops: projections, convolution, gates, rule, gated norm.

The layer's submodules are called as modules (a quantised projection, an adapter, a hook or a patched norm does its own
work); between them

    q, k, v = silu(causal_conv1d(qkv))        per channel
    g, beta = gdn_gates(a, b, A_log, dt_bias)
    o, S    = gated_delta_rule(q, k, v, g, beta, S)      q and k normalised, S the recurrent state
    y       = norm(o, z)

with q, k and v as slices of the convolution's result, read in place, and key heads shared, not repeated. The next few
tokens of sequences in a cache take one op for all of it, :func:`~inlay.ops.gdn.gdn_layer_step`, where that is the same.

A cache holds two tensors a layer, which keep their addresses: the last W inputs of the convolution [B, C, W], and the
recurrent state [B, Hv, K, V].

Sources: ``Qwen3NextGatedDeltaNet`` and ``Qwen3_5GatedDeltaNet`` in transformers, https://arxiv.org/abs/2412.06464.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.hf import norms
from inlay.hf.gdn_recognise import GdnSpec
from inlay.hf.recognise import NormSpec, Setting
from inlay.ops import _checks as checks
from inlay.ops._packing import sequence_offsets
from inlay.ops.conv import causal_conv1d, causal_conv1d_step
from inlay.ops.gdn import MAX_STEP_TOKENS, gated_delta_rule, gated_delta_step, gdn_gates, gdn_layer_step

# The norm that gdn_layer_step computes.
_NORM_OF_STEP = Setting(
    "gated_rms_norm", {"weight_offset": 0.0, "rounding": "stepwise", "activation": "silu", "norm_before_gate": True}
)


class Packing(NamedTuple):
    """How sequences lie one after another in a batch row, as transformers' collators say it; None twice if they do not.

    Attributes:
        cu_seq_lens_q: [N + 1] offsets of the sequences, for one batch row.
        seq_idx: [B, T], an integer a token: a sequence starts wherever it changes.
    """

    cu_seq_lens_q: Tensor | None
    seq_idx: Tensor | None

    def offsets(self) -> Tensor | None:
        if self.cu_seq_lens_q is not None or self.seq_idx is None:
            return self.cu_seq_lens_q
        return sequence_offsets(self.seq_idx)


class _Projected(NamedTuple):
    """qkv: [B, T, 2 Hk K + Hv V]; z: [B, T, Hv, V]; b and a: [B, T, Hv]."""

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


def run(
    layer: Any, spec: GdnSpec, hidden_states: Tensor, cache: Any, attention_mask: Tensor | None, packing: Packing
) -> Tensor:
    """The layer's result.

    Args:
        layer: the module.
        hidden_states: [B, T, hidden].
        cache: a transformers cache, which is read and updated, or None.
        attention_mask: [B, T] or None: zeros mark padding, which then writes nothing into the states.
        packing: with a cache, that one goes on with the last of the sequences.
    """
    if attention_mask is not None:
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    projected = _project(layer, spec, hidden_states)
    states = None if cache is None else states_in(cache, layer.layer_idx)
    cu_seqlens = packing.offsets()
    if states is not None and cu_seqlens is None and _can_step(layer, projected, states):
        y = _step(layer, spec, projected, *states)
    else:
        y = _sequences(layer, projected, cache, states, cu_seqlens)
    return layer.out_proj(y.reshape(*hidden_states.shape[:2], -1))


def states_in(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor] | None:
    """The convolution's and the recurrent state of a cache, or None before the first tokens."""
    layer = cache.layers[layer_idx]
    # Not whether there are tensors: after a reset they stay, and updating one state marks both as there.
    if not layer.has_previous_state[0] or layer.recurrent_states[0] is None:
        return None
    return layer.conv_states[0], layer.recurrent_states[0]


def _project(layer: Any, spec: GdnSpec, hidden_states: Tensor) -> _Projected:
    if not spec.grouped:
        z = layer.in_proj_z(hidden_states).unflatten(-1, (-1, layer.head_v_dim))
        return _Projected(
            layer.in_proj_qkv(hidden_states), z, layer.in_proj_b(hidden_states), layer.in_proj_a(hidden_states)
        )
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(
        layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states)
    )
    # With as many key heads as value heads, b and a are every other column of their projection.
    return _Projected(torch.cat([x.flatten(2) for x in (q, k, v)], -1), z, b.contiguous(), a.contiguous())


def _can_step(layer: Any, projected: _Projected, states: tuple[Tensor, Tensor]) -> bool:
    """Whether the states may be updated in place: for a few tokens, and no gradients."""
    return (
        1 <= projected.qkv.shape[1] <= MAX_STEP_TOKENS
        and states[0].dtype == projected.qkv.dtype
        and not _needs_grad(layer, projected, states)
    )


def _needs_grad(layer: Any, projected: _Projected, states: tuple[Tensor, Tensor] | None) -> bool:
    vectors = (layer.conv1d.weight, layer.conv1d.bias, layer.A_log, layer.dt_bias)
    return checks.needs_grad(*projected, *vectors, *(states or ()))


def _step(layer: Any, spec: GdnSpec, projected: _Projected, conv_state: Tensor, recurrent_state: Tensor) -> Tensor:
    """Decoding: the next tokens, with both states updated in place."""
    qkv, z, b, a = projected
    conv = layer.conv1d
    norm = _norm_within_step(layer, spec.norm, projected)
    if norm is not None:
        weight, eps = norm
        return gdn_layer_step(
            qkv, z, a, b, conv.weight, conv.bias, layer.A_log, layer.dt_bias, weight, conv_state, recurrent_state,
            key_heads=layer.num_k_heads, eps=eps,
        )  # fmt: skip
    mixed = causal_conv1d_step(qkv, conv_state, conv.weight, conv.bias, activation="silu")
    g, beta = gdn_gates(a, b, layer.A_log, layer.dt_bias)
    o = gated_delta_step(*_heads(layer, mixed), g, beta, recurrent_state, l2norm_qk=True)
    return _normalised(layer, o, z)


def _norm_within_step(layer: Any, spec: NormSpec | None, projected: _Projected) -> tuple[Tensor, float] | None:
    """The norm's weight and eps, where gdn_layer_step may compute the norm too; None where its module has to be called.

    As with a norm that is fused with the residual add, the module's own counter then does not move: the layer's does.
    """
    norm, z = layer.norm, projected.z
    if spec is None or norms.call_reason(norm, spec) is not None:
        return None
    if z.dtype != projected.qkv.dtype or z.stride(-1) != 1:
        return None
    (weight, bias), eps = norms.vectors(norm, spec), getattr(norm, spec.eps)
    if weight is None or bias is not None or eps is None or checks.needs_grad(weight):
        return None
    return (weight, eps) if norms.setting_for(spec, z, weight, bias, z) == _NORM_OF_STEP else None


def _sequences(
    layer: Any,
    projected: _Projected,
    cache: Any,
    states: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Training and prefill, from the beginning or from the cache's states."""
    qkv, z, b, a = projected
    if cu_seqlens is not None:  # all batch rows' tokens one after another
        qkv, b, a = (x.reshape(1, -1, x.shape[-1]) for x in (qkv, b, a))
    conv_before = recurrent_before = None
    width = layer.conv1d.weight.shape[-1]
    if states is not None:
        conv_before, recurrent_before = states[0][..., 1 - width :].to(qkv.dtype, copy=True), states[1]
        if _needs_grad(layer, projected, states):
            recurrent_before = recurrent_before.clone()  # kept for the backward, and the cache's is about to change
    results = causal_conv1d(
        qkv,
        layer.conv1d.weight,
        layer.conv1d.bias,
        activation="silu",
        initial_state=conv_before,
        return_final_state=cu_seqlens is not None,
        cu_seqlens=cu_seqlens,
    )
    mixed, inputs = (results, qkv[:, -width:].mT) if isinstance(results, Tensor) else results
    g, beta = gdn_gates(a, b, layer.A_log, layer.dt_bias)
    results = gated_delta_rule(
        *_heads(layer, mixed),
        g,
        beta,
        initial_state=recurrent_before,
        output_final_state=cache is not None,
        l2norm_qk=True,
        cu_seqlens=cu_seqlens,
    )
    if isinstance(results, Tensor):
        return _normalised(layer, results, z)
    o, recurrent_after = results
    # A cache has as many rows as the batch: of packed sequences, which have one row, the last is the one to go on.
    last = slice(None) if cu_seqlens is None else slice(-1, None)
    cache.update_conv_state(inputs[last], layer.layer_idx, conv_kernel_size=width)
    cache.update_recurrent_state(recurrent_after[last], layer.layer_idx)
    return _normalised(layer, o, z)


def _heads(layer: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B, T, Hk, K] and v [B, T, Hv, V], slices of [B, T, 2 Hk K + Hv V]."""
    q, k, v = mixed.split((layer.key_dim, layer.key_dim, layer.value_dim), -1)
    keys, values = (-1, layer.head_k_dim), (-1, layer.head_v_dim)
    return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, values)


def _normalised(layer: Any, o: Tensor, z: Tensor) -> Tensor:
    """[B * T * Hv, V], by the layer's norm: a module with hooks, counters and a patch of its own."""
    return layer.norm(o.reshape(-1, layer.head_v_dim), z.reshape(-1, layer.head_v_dim))
