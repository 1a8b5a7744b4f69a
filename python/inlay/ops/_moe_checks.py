"""Every condition on the MoE family's arguments, with a message that names the argument."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from inlay.ops import _checks as checks

MAX_ROUTED_EXPERTS = 1024  # as in csrc/moe/params.h, like the rest
MAX_SLOTS = 32
SCORING = {"softmax": 0, "sigmoid": 1}
SOFTMAX_OF_CHOSEN = 2
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "gpt_oss": 5}

_ROUTER = "moe_router"


def check_router(
    logits: Tensor,
    k: int,
    scoring: str,
    bias: Tensor | None,
    groups: tuple[int, int] | None,
    scaling: float,
    softmax_after_topk: bool,
    forced_indices: Tensor | None,
    mask: Tensor | None,
    weights_dtype: torch.dtype | None,
) -> None:
    op = _ROUTER
    checks.supported(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must have 2 dimensions (tokens, experts), got {logits.dim()}")
    tokens, experts = logits.shape
    if not 1 <= experts <= MAX_ROUTED_EXPERTS:
        raise ValueError(f"{op}: logits must have 1 to {MAX_ROUTED_EXPERTS} columns (experts), got {experts}")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= min(MAX_SLOTS, experts):
        raise ValueError(f"{op}: k must be 1 to {min(MAX_SLOTS, experts)}, got {k}")
    checks.choice(op, "scoring", scoring, SCORING)
    if softmax_after_topk and scoring != "softmax":
        raise ValueError(f"{op}: scoring must be 'softmax' with softmax_after_topk, got {scoring!r}")
    _number(op, "scaling", scaling)
    if bias is not None:
        _shaped(op, "bias", bias, [experts], "experts", logits, "logits")
        _dtype_beside(op, "bias", bias, logits)
    _check_groups(groups, experts, k)
    if forced_indices is not None:
        if groups is not None:
            raise ValueError(f"{op}: groups must be None with forced_indices, got {groups!r}")
        _shaped(op, "forced_indices", forced_indices, [tokens, k], "tokens, k", logits, "logits")
        _integers(op, "forced_indices", forced_indices, experts - 1, f"{experts - 1}")
    if mask is not None:
        _shaped(op, "mask", mask, [tokens], "tokens", logits, "logits")
        checks.dtype(op, "mask", mask.dtype, (torch.bool,))
    if weights_dtype is not None:
        wide = logits.dtype == torch.float64
        checks.dtype(op, "weights_dtype", weights_dtype, (torch.float64,) if wide else checks.HALVES_AND_FLOAT32)


def _check_groups(groups: Any, experts: int, k: int) -> None:
    if groups is None:
        return
    if not (isinstance(groups, tuple) and len(groups) == 2 and all(isinstance(n, int) for n in groups)):
        raise TypeError(f"{_ROUTER}: groups must be two ints (how many, how many of them are chosen), got {groups!r}")
    count, chosen = groups
    if count < 1 or experts % count or (count > 1 and experts // count < 2):
        raise ValueError(f"{_ROUTER}: groups must divide {experts} experts into groups of two or more, got {groups!r}")
    if not 1 <= chosen <= count or experts // count * chosen < k:
        raise ValueError(f"{_ROUTER}: groups must choose 1 to {count} that hold {k} experts, got {groups!r}")


def check_experts(
    op: str,
    x: Tensor,
    indices: Tensor | None,
    weights: Tensor | None,
    ends: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    limit: float | None,
    shared: Tensor | None,
    shared_gate: Tensor | None,
) -> None:
    checks.supported(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have 2 dimensions (tokens, hidden), got {x.dim()}")
    tokens, hidden = x.shape
    checks.choice(op, "activation", activation, ACTIVATIONS)
    if activation == "gpt_oss" and not gated:
        raise ValueError(f"{op}: gated must be True with activation 'gpt_oss', got {gated!r}")
    if limit is not None:
        _number(op, "limit", limit)
        if not limit > 0:
            raise ValueError(f"{op}: limit must be above 0 or None, got {limit}")
    for name, matrix in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        checks.given(op, name, matrix)
        if matrix.dim() != 3:
            raise ValueError(f"{op}: {name} must have 3 dimensions (experts first), got {matrix.dim()}")
    experts, intermediate = down_proj.shape[0], down_proj.shape[1 if transposed else 2]
    if hidden < 1 or intermediate < 1:
        raise ValueError(f"{op}: x and down_proj must not be empty in H or I, got {hidden} and {intermediate}")
    width = 2 * intermediate if gated else intermediate
    up_shape, down_shape = [experts, width, hidden], [experts, hidden, intermediate]
    if transposed:
        up_shape[1:], down_shape[1:] = up_shape[:0:-1], down_shape[:0:-1]
    layout = "[E, in, out], as transposed" if transposed else "[E, out, in]"
    for name, matrix, shape in (("gate_up_proj", gate_up_proj, up_shape), ("down_proj", down_proj, down_shape)):
        _shaped(op, name, matrix, shape, layout, x, "x")
        checks.dtype(op, name, matrix.dtype, (x.dtype,))
        if matrix.shape[-1] > 1 and matrix.stride(-1) != 1 and matrix.numel() > 0:
            raise ValueError(
                f"{op}: {name} must have stride 1 in its last dimension, got strides {list(matrix.stride())}; "
                "experts stored the other way round are read in place with transposed"
            )
    for name, bias, size in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, hidden)):
        if bias is not None:
            _shaped(op, name, bias, [experts, size], "experts, outputs", x, "x")
            _dtype_beside(op, name, bias, x)
    if ends is not None:
        _shaped(op, "ends", ends, [experts], "experts", x, "x")
        _integers(op, "ends", ends, tokens, f"{tokens} (rows of x), not decreasing", ordered=True)
        if weights is not None:
            _shaped(op, "weights", weights, [tokens], "rows of x", x, "x")
    else:
        checks.given(op, "indices", indices)  # type: ignore[arg-type]
        checks.given(op, "weights", weights)  # type: ignore[arg-type]
        assert indices is not None
        assert weights is not None
        if indices.dim() != 2 or indices.shape[0] != tokens:
            raise ValueError(f"{op}: indices must have shape [{tokens}, K], got {list(indices.shape)}")
        checks.on_device(op, "indices", indices, x)
        _integers(op, "indices", indices, experts, f"{experts} (for no expert)")
        _shaped(op, "weights", weights, list(indices.shape), "indices's shape", x, "x")
    if weights is not None:
        _dtype_beside(op, "weights", weights, x)
    if shared is not None:
        _shaped(op, "shared", shared, [tokens, hidden], "x's shape", x, "x")
        checks.dtype(op, "shared", shared.dtype, (x.dtype,))
    if shared_gate is not None:
        if shared is None:
            raise ValueError(f"{op}: shared must be given with shared_gate, got None")
        checks.given(op, "shared_gate", shared_gate)
        if list(shared_gate.shape) not in ([tokens], [tokens, 1]):
            raise ValueError(
                f"{op}: shared_gate must have shape [{tokens}] or [{tokens}, 1], got {list(shared_gate.shape)}"
            )
        checks.on_device(op, "shared_gate", shared_gate, x)
        _dtype_beside(op, "shared_gate", shared_gate, x)


def check_num_experts(op: str, num_experts: int, gate_up_proj: Tensor) -> None:
    """By itself, as only some calls say it."""
    checks.given(op, "gate_up_proj", gate_up_proj)
    if not isinstance(num_experts, int) or isinstance(num_experts, bool):
        raise TypeError(f"{op}: num_experts must be an int or None, got {type(num_experts).__name__}")
    held = gate_up_proj.shape[0] if gate_up_proj.dim() else 0
    if num_experts != held:
        raise ValueError(
            f"{op}: num_experts must be {held}, the number of experts in gate_up_proj, got {num_experts}; under expert "
            "parallelism both are of this rank, and indices too"
        )


def _shaped(op: str, name: str, tensor: Tensor, shape: list[int], what: str, x: Tensor, of: str) -> None:
    checks.given(op, name, tensor)
    if list(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape} ({what}), got {list(tensor.shape)}")
    checks.on_device(op, name, tensor, x, of)


def _dtype_beside(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """x's dtype, or float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.dtype(op, name, tensor.dtype, tuple(dict.fromkeys((x.dtype, wide))))


def _integers(op: str, name: str, tensor: Tensor, most: int, up_to: str, ordered: bool = False) -> None:
    """From 0 to ``most``. Values are looked at on the CPU alone: elsewhere that would wait for the device."""
    checks.dtype(op, name, tensor.dtype, (torch.int32, torch.int64))
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in tensor.aminmax())
    if low < 0 or high > most or (ordered and bool((tensor[1:] < tensor[:-1]).any())):
        wrong = low if low < 0 else high
        raise ValueError(f"{op}: {name} must be from 0 to {up_to}, got {tensor.tolist() if ordered else wrong}")


def _number(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
