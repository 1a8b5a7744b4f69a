"""What the ops share of autograd: the base of their functions, and the versions of what they change in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with ``setup_context``, differentiable once, at half the host cost.

    ``apply`` asks for the signature of ``forward`` each time, which takes longer than a launch; it is worked out once.
    ``once_differentiable`` enters and leaves ``no_grad``, for nothing unless someone asked for a second derivative.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        cls.backward = staticmethod(_refusing_second_derivatives(cls.backward))  # type: ignore[method-assign]


def changed_in_place(*tensors: Tensor | None) -> None:
    """Counts a change that native code has made, so that a backward for which a tensor was saved before it is refused.

    Compiled code writes such tensors back by a copy, which counts by itself; inference tensors have no version.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _refusing_second_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    refusing = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *gradients: Any) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return either
