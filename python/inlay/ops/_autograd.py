"""The base of the ops' autograd functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
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


def _refusing_second_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    refusing = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *gradients: Any) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return either
