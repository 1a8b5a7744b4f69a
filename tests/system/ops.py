"""Every op that is registered in ``torch.ops.inlay``, from the dispatcher itself."""

from __future__ import annotations

import torch

import inlay  # noqa: F401  (loads the libraries)


def registered() -> list[str]:
    """Names without the namespace, sorted."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("inlay::") for name in names if name.startswith("inlay::"))


def schema(op: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.inlay, op).default._schema
