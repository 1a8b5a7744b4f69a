"""The base of the ops' autograd functions."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with ``setup_context``, without half of what that costs per call.

    ``apply`` asks for the signature of ``forward`` each time, which takes longer than a launch; it is worked out once.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
