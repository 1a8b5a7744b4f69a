"""Argument checks shared by the public functions: one condition each, one message form.

Form: ``<op>: <argument> must be <rule>, got <actual>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
HALVES_AND_FLOAT32 = _DTYPES["cuda"]
_MAX_ROW_LEVELS = 3  # distinct strides of leading dimensions that kernels follow, see csrc/common/rows.h
_Value = TypeVar("_Value")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def supported(op: str, argument: str, x: Tensor) -> None:
    """A tensor on a device and in a dtype that has kernels."""
    given(op, argument, x)
    dtypes = _DTYPES.get(x.device.type)
    if dtypes is None:
        raise ValueError(f"{op}: {argument} must be on cpu, cuda or meta, got {x.device}")
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {argument} must be {names(dtypes)} on {x.device.type}, got {x.dtype}")


def activations(op: str, argument: str, x: Tensor) -> None:
    """A tensor [..., N] with a dense last dimension, on a device and in a dtype that has kernels."""
    supported(op, argument, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: {argument} must have at least one dimension, got a scalar")
    _dense_rows(op, argument, x)


def given(op: str, argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor, got {type(tensor).__name__}")


def on_device(op: str, argument: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {argument} must be on {of}'s device {x.device}, got {tensor.device}")


def like(op: str, argument: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...], of: str = "x") -> None:
    """A tensor of the shape and device of x, which the op calls ``of``; dense in its last dimension."""
    given(op, argument, tensor)
    if tensor.shape != x.shape:
        raise ValueError(f"{op}: {argument} must have {of}'s shape {list(x.shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {argument} must be {names(dtypes)}, got {tensor.dtype}")
    on_device(op, argument, tensor, x, of)
    _dense_rows(op, argument, tensor)


def vector(op: str, argument: str, tensor: Tensor | None, x: Tensor, of: str = "x") -> None:
    """None, or a dense [N] for x [..., N], which the op calls ``of``."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor or None, got {type(tensor).__name__}")
    if tensor.dim() != 1 or tensor.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: {argument} must have shape [{x.shape[-1]}] ({of}'s width), got {list(tensor.shape)}")
    parameter(op, argument, tensor, x, of)
    _dense_rows(op, argument, tensor)


def parameter(op: str, argument: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    """A weight or bias on the device of x, which the op calls ``of``, in a dtype that goes with x's."""
    on_device(op, argument, tensor, x, of)
    if tensor.dtype not in _DTYPES[x.device.type] or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        allowed = (torch.float64,) if x.dtype == torch.float64 else _DTYPES["cuda"]
        raise ValueError(f"{op}: {argument} must be {names(allowed)} for {x.dtype} {of}, got {tensor.dtype}")


def indices(op: str, argument: str, tensor: Tensor | None, x: Tensor) -> None:
    """None, or a dense [N] of int32 or int64 on x's device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor or None, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {argument} must be int32 or int64, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{op}: {argument} must have 1 dimension, got shape {list(tensor.shape)}")
    on_device(op, argument, tensor, x)
    _dense_rows(op, argument, tensor)


def offsets(op: str, argument: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    """[N + 1] offsets of the sequences packed into the one batch row of x [B, T, ...], which the op calls ``of``.

    Their values are looked at on the CPU alone: elsewhere that would wait for the device.
    """
    given(op, argument, tensor)
    dtype(op, argument, tensor.dtype, (torch.int32, torch.int64))
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        raise ValueError(f"{op}: {argument} must have shape [N + 1], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {argument} must be contiguous, got strides {list(tensor.stride())}")
    if x.shape[0] != 1:
        raise ValueError(f"{op}: {of} must have a batch of 1 with {argument}, got {x.shape[0]}")
    on_device(op, argument, tensor, x, of)
    if tensor.device.type == "cpu":
        values = tensor.tolist()
        if values[0] != 0 or values[-1] != x.shape[1] or values != sorted(values):
            raise ValueError(
                f"{op}: {argument} must not decrease and lead from 0 to the number of tokens {x.shape[1]}, got {values}"
            )


def choice(op: str, argument: str, value: Any, choices: Mapping[Any, _Value]) -> _Value:
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}") from None


def dtype(op: str, argument: str, value: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {argument} must be {names(allowed)}, got {value}")


def dense_gradient(gradient: Tensor) -> Tensor:
    """A gradient in strides that kernels read: autograd hands over any, those of ``y.sum()`` are all 0."""
    if gradient.is_contiguous():
        return gradient
    dense = gradient.shape[-1] <= 1 or gradient.stride(-1) == 1
    if dense and (gradient.dim() <= _MAX_ROW_LEVELS + 1 or _row_levels(gradient) <= _MAX_ROW_LEVELS):
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def same_device(x: Tensor, *others: Tensor | None) -> None:
    """For fakes: torch calls them, not a kernel, as soon as one argument is on the meta device."""
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"every tensor must be on x's device {x.device}, got one on {tensor.device}")


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # not any(...): a generator costs more than the checks
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _dense_rows(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"{op}: {argument} must have stride 1 in its last dimension, got strides {list(tensor.stride())};"
            " call .contiguous() first"
        )
    if tensor.dim() > _MAX_ROW_LEVELS + 1 and _row_levels(tensor) > _MAX_ROW_LEVELS:
        raise ValueError(
            f"{op}: {argument} must have leading dimensions that merge into at most {_MAX_ROW_LEVELS}, got shape"
            f" {list(tensor.shape)} with strides {list(tensor.stride())}; call .contiguous() first"
        )


def _row_levels(tensor: Tensor) -> int:
    """How many leading dimensions remain once those that lie evenly in memory are merged."""
    if tensor.numel() == 0:
        return 0
    levels, size, stride = 0, 1, 0
    for i in range(tensor.dim() - 2, -1, -1):
        if tensor.shape[i] == 1:
            continue
        if levels > 0 and tensor.stride(i) == stride * size:
            size *= tensor.shape[i]
        else:
            levels, size, stride = levels + 1, tensor.shape[i], tensor.stride(i)
    return levels
