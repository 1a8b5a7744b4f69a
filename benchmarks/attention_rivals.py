"""Other implementations of attention, each callable with the same tensors and options.

An implementation maps an op's name ("attention", or "extras": with a gate, sinks or a softcap) to
``function(tensors, options) -> y``; tensors are named as ``inlay.attention``'s arguments, in its layout, and so are
options. What an implementation has no argument for it refuses. What cannot be imported is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import inlay

Tensors = dict[str, Tensor]
Options = Mapping[str, Any]
Op = Callable[[Tensors, Options], Tensor]
Implementation = Mapping[str, Op]

PACKAGES = ("flash-attn-3", "flash-attn-4", "flash-attn", "transformers", "nvidia-cudnn-cu13")
LEAVES = ("q", "k", "v", "gate", "sinks")


def ours() -> Implementation:
    def attention(t: Tensors, options: Options) -> Tensor:
        return inlay.attention(**_arguments(t), **options)

    return {"attention": attention, "extras": attention}


def ours_deterministic() -> Implementation:
    return {"attention": lambda t, options: inlay.attention(**_arguments(t), **options, deterministic=True)}


def ours_plain() -> Implementation:
    """Without the gate, the sinks or the softcap: what these cost."""

    def plain(t: Tensors, options: Options) -> Tensor:
        return inlay.attention(**{name: t[name] for name in "qkv"}, **{**options, "softcap": 0.0})

    plain.differs = True  # type: ignore[attr-defined]
    return {"extras": plain}


def _arguments(t: Tensors) -> Tensors:
    return {name: tensor for name, tensor in t.items() if name != "dy"}


def _plain_only(t: Tensors, options: Options, allowed: tuple[str, ...] = ("causal",)) -> None:
    """Refuses what the implementation would leave out."""
    extra = [name for name in _arguments(t) if name not in ("q", "k", "v")]
    extra += [name for name, value in options.items() if name not in allowed and value not in (0.0, (None, None))]
    if extra:
        raise NotImplementedError(f"no {', '.join(extra)}")


def _sdpa(backend: SDPBackend | None) -> Callable[[], Implementation]:
    def make() -> Implementation:
        def attention(t: Tensors, options: Options) -> Tensor:
            _plain_only(t, options)
            q, k, v = (t[name].transpose(1, 2) for name in "qkv")
            grouped = q.shape[1] != k.shape[1]
            if grouped and backend == SDPBackend.EFFICIENT_ATTENTION:  # it has no groups: models repeat for it
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
                grouped = False
            causal = options.get("causal", False)
            if backend is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            else:
                with sdpa_kernel(backend):
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            return y.transpose(1, 2)

        return {"attention": attention}

    return make


def flash_attention_3() -> Implementation:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return {"attention": _flash(flash_attn_func, flash_attn_varlen_func)}


def flash_attention_4() -> Implementation:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return {"attention": _flash(flash_attn_func, flash_attn_varlen_func, no_limit=None)}


def flash_attention_2() -> Implementation:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return {"attention": _flash(flash_attn_func, flash_attn_varlen_func)}


def _flash(function: Callable, packed: Callable, no_limit: int | None = -1) -> Op:
    def attention(t: Tensors, options: Options) -> Tensor:
        t = _arguments(t)
        offsets = t.pop("cu_seqlens_q", None)
        _plain_only(t, options, ("causal", "window", "softcap"))
        left, right = options.get("window", (None, None))
        keywords: dict[str, Any] = {"causal": options.get("causal", False)}
        if (left, right) != (None, None):
            keywords["window_size"] = (no_limit if left is None else left, no_limit if right is None else right)
        if options.get("softcap"):
            keywords["softcap"] = options["softcap"]
        if offsets is None:
            return _first(function(t["q"], t["k"], t["v"], **keywords))
        longest = t["q"].shape[1]  # known without waiting for the device
        rows = (t[name][0] for name in "qkv")
        y = packed(
            *rows, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, **keywords
        )
        return _first(y)[None]

    return attention


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def eager() -> Implementation:
    """transformers' own function, with the mask that it is given."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attention(t: Tensors, options: Options) -> Tensor:
        _plain_only(t, options)
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        mask = None
        if options.get("causal"):
            least = torch.finfo(q.dtype).min
            mask = torch.full((q.shape[2], k.shape[2]), least, device=q.device, dtype=q.dtype).triu(1)[None, None]
        return eager_attention_forward(module, q, k, v, mask, scaling=q.shape[3] ** -0.5)[0]

    return {"attention": attention}


# Name: maker and devices.
IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], tuple[str, ...]]] = {
    "inlay": (ours, ("cuda", "cpu")),
    "inlay_determ": (ours_deterministic, ("cuda",)),
    "inlay_plain": (ours_plain, ("cuda", "cpu")),
    "sdpa": (_sdpa(None), ("cpu",)),
    "cudnn": (_sdpa(SDPBackend.CUDNN_ATTENTION), ("cuda",)),
    "flash": (_sdpa(SDPBackend.FLASH_ATTENTION), ("cuda",)),
    "efficient": (_sdpa(SDPBackend.EFFICIENT_ATTENTION), ("cuda",)),
    "fa3": (flash_attention_3, ("cuda",)),
    "fa4": (flash_attention_4, ("cuda",)),
    "flash_attn": (flash_attention_2, ("cuda",)),
    "hf_eager": (eager, ("cuda", "cpu")),
}
