"""The attention function behind ``attn_implementation="inlay"``: :func:`inlay.attention` with transformers' arguments.

What the op cannot compute goes to transformers' sdpa, or to the model's own eager function where sdpa ignores something
that was asked for; such calls are counted with the reason, by module, and :func:`inlay.report` shows them.

Arguments as of transformers' attention functions: query [B, H, S, D], key and value [B, Hkv, Sk, D], any strides;
attention_mask what :mod:`inlay.hf.masks` makes, or one of four dimensions, bool (True: attend) or added to the scores.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from inlay import reference
from inlay.hf import masks
from inlay.hf.binding import binding_of
from inlay.hf.norms import device_reason, is_plain, transform_reason
from inlay.ops import _attention_checks, _attention_kernels
from inlay.ops import _checks as checks
from inlay.ops.attention import attention

NAME = "inlay"

# The parameters of models' eager attention functions that the op serves; what a window hides is in the mask. Keywords
# that a model's eager function does not know either are for other implementations, and change nothing.
_KNOWN = {
    *("module", "query", "key", "value", "attention_mask", "scaling", "dropout"),
    *("sliding_window", "softcap", "s_aux", "is_causal", "position_bias"),
}


@dataclass(eq=False)
class Counters:
    """How the attention of one module has run."""

    calls: Counter[torch.device] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)


_counters: WeakKeyDictionary[nn.Module, Counters] = WeakKeyDictionary()


def counters_of(module: nn.Module) -> Counters | None:
    """The counters of a module that has called the attention function, or None."""
    return _counters.get(module)


class Inputs(NamedTuple):
    """One call: tensors as transformers has them, and the scores' options.

    Attributes:
        sinks: [H], or None.
        bias: [B or 1, H or 1, Sq, Sk], added to the scores, or None.
        gate: [B, Sq, H, DV], before its sigmoid, or None.
        is_causal: whether a mask of None is causal.
        cu_seq_lens, cu_seq_lens_k: offsets of packed sequences of queries and of keys, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    is_causal: bool
    cu_seq_lens: Tensor | None
    cu_seq_lens_k: Tensor | None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """For transformers' ``AttentionInterface``. Returns the result [B, Sq, H, DV], contiguous, and weights or None.

    Raises:
        ValueError: for a paged cache: its sequences are told apart by a mask that is only made for other names.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            'attn_implementation="inlay": cache must be None, got a paged one; continuous batching needs "sdpa"'
        )
    inputs = inputs_of(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    reason = why_not(module, inputs, kwargs)
    _count(module, query.device, reason)
    if reason is not None:
        return fall_back(module, inputs, kwargs)
    return compute(inputs), None


def inputs_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
    gate: Tensor | None = None,
) -> Inputs:
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as it does for sdpa
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        gate = None if gate is None else gate.to(dtype)
    return Inputs(
        query, key, value, mask, scaling, dropout, kwargs.get("softcap"), kwargs.get("s_aux"),
        kwargs.get("position_bias"), gate, bool(causal) and mask is None and query.shape[2] > 1,
        kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"),
    )  # fmt: skip


def why_not(module: nn.Module, inputs: Inputs, kwargs: dict[str, Any]) -> str | None:
    """Why the op cannot compute this call, or None."""
    if wants_weights(kwargs):
        return "attention weights are asked for"
    for name in _eager_of(module).more:
        if kwargs.get(name) is not None:
            return f"its eager attention takes {name}"
    return _tensor_reason(inputs) or transform_reason() or _mask_reason(inputs) or _kernel_reason(inputs)


def compute(inputs: Inputs, op: Callable[..., Any] = attention) -> Tensor:
    """The result [B, Sq, H, DV], by the op or by its reference."""
    q, k, v, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    bias = inputs.bias
    cu_seq_lens, cu_seq_lens_k = inputs.cu_seq_lens, inputs.cu_seq_lens_k
    if inputs.is_causal and k.shape[2] > q.shape[2]:
        # The first tokens of a static cache: what lies behind them is not there yet.
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        bias = None if bias is None else bias[..., : q.shape[2]]
    ranges = seen = None
    if mask is not None and masks.is_ranges(mask):
        ranges = mask
    elif mask is not None and mask.dtype == torch.bool:
        seen = mask
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    if cu_seq_lens is not None and (mask is not None or bias is not None):
        ranges = masks.within_sequences(mask if ranges is not None else None, q.shape[2], cu_seq_lens)
        cu_seq_lens = None
    if cu_seq_lens is None:
        cu_seq_lens_k = None
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        bias = bias.to(q.dtype if q.dtype == torch.float64 else torch.float32)
    return op(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=inputs.is_causal, scale=inputs.scaling,
        softcap=inputs.softcap or 0.0, sinks=inputs.sinks, gate=inputs.gate, mask=seen, bias=bias,
        cu_seqlens_q=cu_seq_lens, cu_seqlens_k=cu_seq_lens_k, dropout_p=inputs.dropout,
        key_ranges=None if ranges is None else ranges[:, 0],
    )  # fmt: skip


def fall_back(module: nn.Module, inputs: Inputs, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The call by transformers' own functions, with a mask that they understand.

    By the op's reference, should sdpa ignore something and the model have no eager function.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query, key, value, mask = inputs[:4]
    if mask is not None and mask.dim() == 4 and masks.is_ranges(mask):
        mask = masks.visible(mask, key.shape[2])
    eager = _eager_of(module)
    function, arguments = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(kwargs)
    ignored = ("softcap", "s_aux", *eager.more)  # by sdpa, or refused
    wants_eager = wants_weights(kwargs) or any(kwargs.get(name) is not None for name in ignored)
    # Neither sdpa nor models' eager functions know of offsets, and tokens would see other sequences'.
    packed = inputs.cu_seq_lens is not None and query.shape[0] == 1 and not wants_weights(kwargs)
    if packed or (eager.function is None and (inputs.softcap or inputs.sinks is not None)):
        return compute(inputs, reference.attention), None
    if wants_eager and eager.function is not None:
        function = eager.function
        if mask is None and inputs.is_causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    y, weights = function(
        module, query, key, value, mask, dropout=inputs.dropout, scaling=inputs.scaling, **arguments
    )  # fmt: skip
    return (y if inputs.gate is None else y * torch.sigmoid(inputs.gate)), weights


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the model returns attention weights, which only eager code has."""
    return bool(kwargs.get("output_attentions")) or _records_weights()


def _records_weights() -> bool:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    recorded = None if collector is None else collector.get()
    return recorded is not None and any("attentions" in key for key in recorded)


class _Eager(NamedTuple):
    """A model's own attention function, and what it takes by name that the op does not know."""

    function: Callable[..., Any] | None
    more: tuple[str, ...] = ()


_eager: dict[type[nn.Module], _Eager] = {}


def _eager_of(module: nn.Module) -> _Eager:
    found = _eager.get(type(module))
    if found is None:
        found = _find_eager(type(module))
        if not torch.compiler.is_compiling():
            _eager[type(module)] = found
    return found


def _find_eager(cls: type[nn.Module]) -> _Eager:
    """That in the Python module which defines the class, or one of those it is derived from."""
    for base in cls.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            return _Eager(function, tuple(name for name in named if name not in _KNOWN))
    return _Eager(None)


def _tensor_reason(inputs: Inputs) -> str | None:
    q, k, v = inputs[:3]
    tensors = {"query": q, "key": k, "value": v, "mask": inputs.mask, "sinks": inputs.sinks, "bias": inputs.bias}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not (is_plain(tensor) or torch.compiler.is_compiling()):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device != q.device:
            return f"{name} is on {tensor.device.type}, query on {q.device.type}"
    if not q.dim() == k.dim() == v.dim() == 4:
        return "query, key and value have not four dimensions"
    if not q.dtype == k.dtype == v.dtype:
        return f"query, key and value are {checks.names((q.dtype, k.dtype, v.dtype))}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return "query, key and value have other batch sizes"
    if q.shape[1] % max(k.shape[1], 1) or k.shape[1] == 0:
        return f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads"
    for width in (q.shape[3], v.shape[3]):
        multiple, largest = _attention_checks.HEAD_DIM_MULTIPLE, _attention_checks.MAX_HEAD_DIM
        if width % multiple or not 0 < width <= largest:
            return f"heads are {width} wide, not a multiple of {multiple} up to {largest}"
    if inputs.sinks is not None and inputs.sinks.dtype not in (q.dtype, torch.float32):
        return f"sinks are {inputs.sinks.dtype}, query is {q.dtype}"
    return None if 0 <= inputs.dropout < 1 else f"dropout is {inputs.dropout}"


def _mask_reason(inputs: Inputs) -> str | None:
    q, k, mask = inputs.query, inputs.key, inputs.mask
    if mask is not None:
        if mask.dim() != 4:
            return f"a mask of {mask.dim()} dimensions"
        if masks.is_ranges(mask):
            if mask.shape[0] != q.shape[0] or mask.shape[2] != q.shape[2]:
                return "the mask is for another batch size or number of queries"
        elif mask.dtype != torch.bool and not mask.is_floating_point():
            return f"the mask is {checks.names((mask.dtype,))}"
        elif not _fits(mask, inputs):
            return f"a mask {list(mask.shape)} for {[q.shape[0], q.shape[1], q.shape[2], k.shape[2]]} scores"
    if inputs.bias is not None and not (inputs.bias.dim() == 4 and _fits(inputs.bias, inputs)):
        return f"a bias {list(inputs.bias.shape)} for {[q.shape[0], q.shape[1], q.shape[2], k.shape[2]]} scores"
    if inputs.is_causal and k.shape[2] < q.shape[2]:
        return "causal attention with fewer keys than queries"
    if inputs.cu_seq_lens is not None:
        if q.shape[0] != 1:
            return "cu_seq_lens_q is given for more than one batch row"
        if k.shape[2] != q.shape[2]:
            return "packed sequences go on with a cache"
    return None


def _fits(scores: Tensor, inputs: Inputs) -> bool:
    full = (inputs.query.shape[0], inputs.query.shape[1], inputs.query.shape[2], inputs.key.shape[2])
    return all(size in (1, whole) for size, whole in zip(scores.shape, full, strict=True))


def _kernel_reason(inputs: Inputs) -> str | None:
    q, v = inputs.query, inputs.value
    reason = device_reason(q)
    if reason is not None:
        return reason
    needs_grad = checks.needs_grad(q, inputs.key, v, inputs.sinks, inputs.gate, inputs.bias)
    if _attention_kernels.has_kernel(q, v, needs_grad):
        return None
    return f"no kernel for {checks.names((q.dtype,))} heads {q.shape[3]} wide" + " with gradients" * needs_grad


def _count(module: nn.Module, device: torch.device, reason: str | None) -> None:
    if torch.compiler.is_compiling():  # a changing counter would make compiled code recompile
        return
    binding = binding_of(module)
    if binding is not None and binding.plan.op == "attention_layer":
        return  # the layer's own code called this, and why it did has been counted
    counters = _counters.get(module)
    if counters is None:
        counters = _counters[module] = Counters()
    if reason is None:
        counters.calls[device] += 1
    else:
        counters.fallbacks[reason] += 1
