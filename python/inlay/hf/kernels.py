"""Inlay's functions for transformers' kernel hooks, for models that are loaded with ``use_kernels=True``.

transformers looks functions such as ``chunk_gated_delta_rule`` up by name and device, in a mapping that the package
``kernels`` reads. :func:`register_kernels` puts Inlay's into it, for the CPU, which has none otherwise, and for CUDA.
They serve every model with these functions, and only these functions: :func:`inlay.patch` replaces more of a model.

``kernels`` wants a class for each function, without state, whose ``forward`` has that function's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay import _load
from inlay.compat import causal_conv1d, fla
from inlay.ops import _checks as checks


def register_kernels() -> list[str]:
    """Registers Inlay's functions with transformers: models that use kernels from now on use these.

    That is ``from_pretrained(..., use_kernels=True)``, or ``model.set_use_kernels(True)``. CUDA's are registered where
    Inlay's CUDA library is loaded.

    Returns:
        The names of the functions.

    Raises:
        ImportError: transformers is missing, or the package ``kernels`` in a version that this transformers takes.
    """
    from transformers.integrations import hub_kernels

    mapping_of = getattr(hub_kernels, "get_kernel_mapping_transformers", None)
    if mapping_of is None:
        raise ImportError(
            "register_kernels: transformers has kernel hooks only with the package kernels, in a version that it takes;"
            " pip install kernels, or use inlay.patch(model)"
        )
    mapping = mapping_of()
    devices = ("cpu", "cuda") if _load.cuda_library().loaded else ("cpu",)
    for name, layer in LAYERS.items():
        mapping.setdefault(name, {}).update(dict.fromkeys(devices, _Repository(name, layer)))
    return list(LAYERS)


@dataclass(frozen=True)
class _Repository:
    """What ``kernels`` loads a layer from: here, not a download."""

    layer_name: str
    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


class CausalConv1d(nn.Module):
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        fused, then = _split(activation)
        return then(
            causal_conv1d.causal_conv1d_fn(hidden_states, weight, bias, kwargs.get("seq_idx"), activation=fused)
        )


class CausalConv1dUpdate(nn.Module):
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        fused, then = _split(activation)
        if not checks.needs_grad(hidden_states, conv_state, weight, bias):
            return then(causal_conv1d.causal_conv1d_update(hidden_states, conv_state, weight, bias, fused))
        before = conv_state.clone()  # kept for the backward
        conv_state.copy_(torch.cat([before, hidden_states], -1)[..., -before.shape[-1] :])
        before = before[..., 1 - weight.shape[-1] :]
        return then(causal_conv1d.causal_conv1d_fn(hidden_states, weight, bias, None, before, activation=fused))


class ChunkGatedDeltaRule(nn.Module):
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        return fla.chunk_gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            initial_state=_kept(initial_state, query, key, value),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=kwargs.get("cu_seqlens"),
        )


class RecurrentGatedDeltaRule(nn.Module):
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        return fla.fused_recurrent_gated_delta_rule(
            query,
            key,
            value,
            g,
            beta=beta,
            initial_state=_kept(initial_state, query, key, value),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=kwargs.get("cu_seqlens"),
        )


LAYERS: dict[str, type[nn.Module]] = {
    "causal_conv1d_fn": CausalConv1d,
    "causal_conv1d_update": CausalConv1dUpdate,
    "chunk_gated_delta_rule": ChunkGatedDeltaRule,
    "fused_recurrent_gated_delta_rule": RecurrentGatedDeltaRule,
}


def _kept(state: Tensor | None, *others: Tensor) -> Tensor | None:
    """The state, or a copy of it if a backward will need it: it is a cache's, which changes right after the call."""
    return state.clone() if state is not None and checks.needs_grad(state, *others) else state


def _split(activation: str | None) -> tuple[str | None, Any]:
    """The activation that the convolution computes, and a function for any other."""
    if activation in (None, "silu", "swish"):
        return activation, lambda y: y
    from transformers.activations import ACT2FN

    return None, ACT2FN[activation]
