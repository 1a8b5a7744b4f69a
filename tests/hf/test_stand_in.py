"""Modules of classes that FSDP2 has derived, whose constructor takes arguments: patched like their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from tests.hf.models import language_model, tokens

fsdp: Any = pytest.importorskip("torch.distributed.fsdp")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
@torch.no_grad()
def test_every_module_is_of_a_derived_class(family: str) -> None:
    plain: Any = language_model(family)
    expected = {(entry.path, entry.op) for entry in inlay.patch(plain).patched}
    inlay.unpatch(plain)
    model: Any = language_model(family)
    model.load_state_dict(plain.state_dict())
    for module in model.model.layers.modules():
        cls = type(module)
        if next(module.parameters(recurse=False), None) is not None or hasattr(module, "layer_idx"):
            module.__class__ = type(f"FSDP{cls.__name__}", (fsdp.FSDPModule, cls), {})
    assert {(entry.path, entry.op) for entry in inlay.patch(model).patched} == expected
    ids = tokens(model)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
